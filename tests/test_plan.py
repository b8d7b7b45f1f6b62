"""``plan``: whether a rank's state fits, what is not counted, and the seconds of a step as text."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hvdlm.cli import main
from hvdlm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import closed_form
from hvdlm.planning.memory_fit import fit, parse_bytes
from hvdlm_language.presets import PRESETS
from launching import ROOT

PLAN_7B = ["plan", "--config", str(ROOT / "examples" / "plan_7b.yaml")]


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("40GiB", 40 * 2**30), ("1.5 tb", 1.5e12), ("1000", 1000.0)])
def test_sizes_have_decimal_and_binary_units(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80 X", "-1GB", "0GB", "nan", "8,0GB"])
def test_a_wrong_size_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(HvdlmError, match="a memory size is a number and a unit"):
        parse_bytes(text)


def test_a_state_fits_up_to_the_last_byte() -> None:
    config, mesh = Config(), Mesh(2, 1, 1)
    spec = PRESETS["gpt"](config.model, 64, config.data.context)
    prediction = closed_form(config, spec, mesh, 0)
    assert prediction is not None
    needed = sum(prediction.memory.values()) + 128 * 2**20  # Horovod's fusion buffer
    exact, short = (fit(prediction, config, spec, mesh, None, needed - missing) for missing in (0, 1))
    assert exact is not None and exact.fits and exact.headroom == 0
    assert short is not None and not short.fits and short.headroom == -1
    assert "CUDA context" in exact.not_counted and exact.reserved == {"fusion buffer": 128 * 2**20}
    assert fit(prediction, config, spec, mesh, None, None) is None


def test_a_plan_tells_what_fits_and_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN_7B, "--gpu_memory", "28GB"]) == 0
    text = capsys.readouterr().out
    first, second = (line for line in text.splitlines() if "fits" in line.lower() or "NOT FIT" in line)
    assert "DOES NOT FIT" in first and "-" in first and "fits" in second
    assert "not counted: CUDA context, NCCL's buffers" in text


def test_a_dry_run_takes_the_options_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "examples" / "plan_7b.yaml"), "--dry_run", "--hardware", "h100"]) == 0
    text = capsys.readouterr().out
    assert "fit into 80.0 GB a GPU" in text and "CUDA context 572.2 MiB" in text
    assert "seconds of a step" in text and "tokens/s" in text and "fitted on: product_efficiency" in text


@pytest.mark.parametrize("exchange, vectors", [("one_bit_adam", 6), ("zero_one_adam", 9), ("demo", 2)])
def test_a_plan_of_updates_has_memory_but_no_seconds(
    exchange: str, vectors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--communication.exchange", exchange, "--train.optimizer", "sgd", "--train.clip", "0"]
    options += ["--model.vocab", "64", "--parallel.data", "2", "--hardware", "h100"]
    assert main(["--dry_run", *options]) == 0
    text = capsys.readouterr().out
    parameters = float(re.search(r"gpt: ([\d,]+) parameters", text)[1].replace(",", ""))
    kept, unit = re.search(rf"{exchange} keeps ([\d.]+) (\w+) on a rank", text).groups()
    assert parse_bytes(kept + unit) == pytest.approx(4 * vectors * parameters, rel=0.01)
    assert f"not predicted: what exchange {exchange} sends is not known" in text


@pytest.mark.parametrize(
    "options, vectors, bytes_per_parameter",
    [
        ([], 2, 4.0),
        (["--communication.compression.algorithm", "int4"], 3, 0.5 + 4 / 128),
        (["--communication.local.outer_momentum", "0"], 1, 4.0),
    ],
)
def test_a_plan_of_streaming_diloco_counts_its_memory_and_bytes(
    options: list[str], vectors: int, bytes_per_parameter: float, capsys: pytest.CaptureFixture[str]
) -> None:
    streaming = ["--communication.exchange", "streaming_diloco", "--model.vocab", "64", "--parallel.data", "2"]
    assert main(["--dry_run", *streaming, *options, "--gpu_memory", "40GiB", "--hardware", "h100"]) == 0
    text = capsys.readouterr().out
    parameters = float(re.search(r"gpt: ([\d,]+) parameters", text)[1].replace(",", ""))
    kept, unit = re.search(r"streaming_diloco keeps ([\d.]+) (\w+) on a rank", text).groups()
    assert parse_bytes(kept + unit) == pytest.approx(4 * vectors * parameters, rel=0.01)
    assert f"exchange's vectors {kept} {unit}" in text and "seconds of a step" in text
    whole, unit, mean, small = re.search(
        r"([\d.]+) (\w+) of parameter differences in a round of 50 steps, ([\d.]+) (\w+) in the mean step", text
    ).groups()
    sent, smallest = parse_bytes(whole + unit), bytes_per_parameter * parameters
    assert 0.99 * smallest < sent < 1.07 * smallest  # norms and biases stay dense
    assert parse_bytes(mean + small) == pytest.approx(parse_bytes(whole + unit) / 50, rel=0.01)


@pytest.mark.parametrize(
    "options, bytes_per_parameter, vectors",
    [
        ([], 4 + 4 / 4, 0),
        (["--communication.compression.algorithm", "int8"], (1 + 1 / 64) * (1 + 1 / 4), 0),
        (["--parallel.zero_gather", "bf16"], 4 + 2 / 4, 0),
        (["--communication.compression.algorithm", "scaled_sign"], 1 / 8 + 1 / 64 + (1 + 1 / 64) / 4, 1),
    ],
)
def test_a_plan_of_zero_counts_compressed_shards(
    options: list[str], bytes_per_parameter: float, vectors: int, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["--parallel.data", "4", "--parallel.zero", "1", "--model.vocab", "64", "--hardware", "h100"]
    layout += ["--model.width", "512", "--train.batch_size", "8"]
    assert main(["--dry_run", *layout, *options]) == 0
    text = capsys.readouterr().out
    parameters = float(re.search(r"gpt: ([\d,]+) parameters", text)[1].replace(",", ""))
    sent, unit = re.search(r"bytes of a rank's step[^\n]*\nstage 0 \(layers[^)]*\)\s+([\d.]+) (\w+)", text).groups()
    assert parse_bytes(sent + unit) == pytest.approx(bytes_per_parameter * parameters, rel=0.05)  # norms, biases: fp32
    assert "seconds of a step" in text
    kept = re.search(r"compression \w+ keeps ([\d.]+) (\w+) on a rank", text)
    assert (kept is not None) == bool(vectors)
    if kept:
        assert parse_bytes("".join(kept.groups())) == pytest.approx(
            8 * vectors * parameters, rel=0.01
        )  # also as before a step


def test_seconds_by_cause_add_up_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN_7B, "--hardware", "a100"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("the slowest rank"))
    *causes, total = map(float, line.split()[3:])
    assert total == pytest.approx(sum(causes), rel=1e-3) and len(causes) == 5 and causes[2] > 0


def test_memory_of_this_machines_gpu_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["plan"]) == 0
    assert "fit into 42.9 GB a GPU" in capsys.readouterr().out
    program.write_text("#!/bin/sh\necho no devices\nexit 9\n")
    assert main(["plan"]) == 0
    assert "fit into" not in capsys.readouterr().out


def test_rates_that_a_machine_lacks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--hardware", "h100", "--train.precision", "fp16"]) == 2
    assert "has no rates of torch in fp16 (it has: any in bf16, any in fp32)" in capsys.readouterr().err


@pytest.mark.parametrize("inner, rows", [(176, 8), (352, 8), (176, 32)])
def test_casts_of_a_swiglu_layer_are_three_matrices(inner: int, rows: int) -> None:
    def activations(mlp_width: int) -> float:
        config = Config(model=ModelConfig(name="llama", layers=1, width=64, heads=4, mlp_width=mlp_width))
        config.train = TrainConfig(batch_size=rows, precision="bf16")
        config.data.context, config.parallel = 16, ParallelConfig()
        prediction = closed_form(config, PRESETS["llama"](config.model, 97, 16), Mesh(1, 1, 1), 0)
        assert prediction is not None
        return prediction.memory["activations"]

    # Another column of the MLP: a column of three matrices in bf16, and 4 values a position (gate, up, SiLU, product).
    column = (activations(inner + 8) - activations(inner)) / 8
    assert column == 2 * 3 * 64 + 2 * 4 * rows * 16
