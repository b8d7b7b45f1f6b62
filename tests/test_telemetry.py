"""What a run tells: metrics.jsonl, summary.json, TensorBoard events, lines on standard output."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import ThreadRanks
from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.io.machine import peak_memory_bytes
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.types import StepResult
from hvdlm.telemetry import default_plugins
from hvdlm.telemetry.rates import Rates
from hvdlm.training.summary import peak_tokens_per_second
from hvdlm_planner.grading import Grading
from hvdlm_telemetry.changed_rate import ChangedRate
from hvdlm_telemetry.computation import Computation
from hvdlm_telemetry.metrics import Metrics
from hvdlm_telemetry.peaks import Peaks
from hvdlm_telemetry.progress import Progress
from hvdlm_telemetry.tensorboard import TensorBoard
from launching import run_python


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.log.run, config.log.every, config.train.steps = str(tmp_path / "run"), 5, 20
    return config


def start(plugin: Any, config: Config, step: int = 0, rank: int = 0) -> None:
    info = {"parameters": 2000, "flops_per_token": 60, "start_step": step, "framework": "torch", "backend": "local"}
    world = SimpleNamespace(rank=rank, size=2)
    plugin.hvdlm_run_started(config, world, {**info, "versions": {}, "vocab": 5, "steps": config.train.steps})


def end_step(plugin: Any, step: int, result: StepResult, seconds: float = 0.5) -> None:
    """Call a plugin as the loop does after a step, with the sums over all steps before."""
    plugin.summed = getattr(plugin, "summed", Rates(4 * 2000)).after(result, seconds)
    plugin.hvdlm_step_ended(step=step, result=result, learning_rate=1e-3, rates=plugin.summed)


def steps(plugin: Any, first: int, last: int, loss: float = 1.0 / 3.0) -> None:
    for step in range(first, last + 1):
        end_step(plugin, step, StepResult(loss, 100.0, 0.5, 0.1, 4000))


def lines(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.log.run) / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_metrics_hold_every_logged_step_in_full_precision(config: Config) -> None:
    metrics = Metrics(config)
    start(metrics, config)
    steps(metrics, 1, 10)
    metrics.hvdlm_evaluated(10, {"val_loss": 2.5})
    logged = lines(config)
    assert [line["step"] for line in logged] == [1, 5, 10, 10]
    assert logged[0]["loss"] == 1.0 / 3.0 and logged[0]["tokens_per_second"] == 200 and logged[0]["comm_bytes"] == 4000
    assert logged[-1] == {"step": 10, "val_loss": 2.5}


def test_rates_cover_the_steps_between_two_lines(config: Config) -> None:
    """Where only every fourth step communicates, the logged steps alone would tell all or nothing."""
    metrics = Metrics(config)
    start(metrics, config)
    for step in range(1, 11):
        speaks = step % 4 == 0
        result = StepResult(1.0, 100.0, 0.5, 0.2 if speaks else 0.0, 8000 if speaks else 0, transfer_seconds=0.1)
        end_step(metrics, step, result, 1.0 if speaks else 0.25)
    first, second, third = lines(config)
    assert first["comm_bytes"] == 0 and first["compression"] is None and first["overlap"] == 1.0
    assert second["comm_bytes"] == 2000 and second["compression"] == 4.0  # steps 2 to 5: one of four speaks
    assert second["comm_share"] == pytest.approx(0.2 / 1.75) and second["overlap"] == pytest.approx(0.5)
    assert third["step"] == 10 and third["comm_bytes"] == 1600 and third["tokens_per_second"] == pytest.approx(250)


def test_overlap_is_null_where_the_backend_lacks_it(config: Config) -> None:
    metrics = Metrics(config)
    start(metrics, config)
    end_step(metrics, 1, StepResult(1.0, 100.0, 0.5, 0.1, 4000))
    assert lines(config)[0]["overlap"] is None


def test_one_rank_prints_no_communication_figures(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(config)
    start(progress, config)
    end_step(progress, 1, StepResult(1.0, 100.0, 0.5))
    assert "comm" not in capsys.readouterr().out.splitlines()[-1]


def test_resuming_drops_later_lines_and_a_half_written_one(config: Config) -> None:
    before = Metrics(config)
    start(before, config)
    steps(before, 1, 15)
    with (Path(config.log.run) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    after = Metrics(config)
    start(after, config, step=10)
    steps(after, 11, 20)
    assert [line["step"] for line in lines(config)] == [1, 5, 10, 15, 20]


def test_non_finite_figures_are_null(config: Config) -> None:
    metrics = Metrics(config)
    start(metrics, config)
    steps(metrics, 1, 1, loss=math.nan)
    metrics.hvdlm_evaluated(1, {"perplexity": math.inf})
    assert lines(config)[0]["loss"] is None and lines(config)[1]["perplexity"] is None


def test_the_summary_is_complete_without_temporary_files(config: Config) -> None:
    metrics = Metrics(config)
    start(metrics, config)
    metrics.hvdlm_run_ended({"val_loss": 2.0, "steps": 20})
    folder = Path(config.log.run)
    assert json.loads((folder / "summary.json").read_text()) == {"val_loss": 2.0, "steps": 20}
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_other_ranks_write_and_print_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for plugin in (Metrics(config), TensorBoard(config), Progress(config)):
        start(plugin, config, rank=1)
        steps(plugin, 1, 5)
        for event, arguments in (("evaluated", (5, {"val_loss": 1.0})), ("run_ended", ({"val_loss": 1.0},))):
            getattr(plugin, f"hvdlm_{event}")(*arguments)
    assert not Path(config.log.run).exists() and capsys.readouterr().out == ""


def test_the_log_options_choose_the_plugins(config: Config) -> None:
    config.log.tensorboard = config.log.progress = False
    plugins_of_logs = [Grading, Metrics, ChangedRate, Peaks, Computation]
    assert [type(plugin) for plugin in default_plugins(config)] == plugins_of_logs


def test_installed_packages_add_observers_to_every_run(config: Config, tmp_path: Path) -> None:
    (tmp_path / "lamp.py").write_text(
        "from hvdlm import hookimpl\n"
        "class Lamp:\n"
        "    @hookimpl\n"
        "    def hvdlm_step_ended(self, step):\n"
        "        print('lamp', step)\n"
        "def observers(config):\n"
        "    return [Lamp()]\n"
    )
    (tmp_path / "lamp-1.dist-info").mkdir()
    (tmp_path / "lamp-1.dist-info" / "METADATA").write_text("Name: lamp\nVersion: 1\n")
    (tmp_path / "lamp-1.dist-info" / "entry_points.txt").write_text("[hvdlm.observers]\nlamp = lamp:observers\n")
    code = (
        "from hvdlm.config import Config\n"
        "from hvdlm.telemetry import default_plugins\n"
        "print(*(type(plugin).__name__ for plugin in default_plugins(Config())))"
    )
    done = run_python(["-c", f"import sys; sys.path.append({str(tmp_path)!r})\n{code}"])
    names = ["Lamp", "StepSecondsLine", "Grading", "Metrics", "TensorBoard", "Progress", "ChangedRate", "Peaks"]
    assert done.stdout.split() == [*names, "Computation"], done.stderr


def test_plain_lines_are_rare_and_readable(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(config)
    start(progress, config)
    steps(progress, 1, 20)
    progress.hvdlm_evaluated(20, {"val_loss": 1.90123, "perplexity": 6.6941, "bits_per_byte": 2.7429})
    progress.hvdlm_checkpoint_saved(20, "run/checkpoints/20", 0.25, 1.5)
    progress.hvdlm_rolled_back(20, 15, [16, 17])
    printed = capsys.readouterr().out.splitlines()[1:]
    # The steps here take no time, so that only the first and the last one are due.
    assert (
        printed[0]
        == "step 1: loss 0.3333, lr 1.00e-03, 200 tokens/s, comm 20.0%, 4 KB/step (1/2.0), data 0.0%, 0:10 left"
    )
    assert printed[1].startswith("step 20: ") and printed[1].endswith("0:00 left")
    assert printed[2] == "step 20: val_loss 1.9012, perplexity 6.69, bits_per_byte 2.74"
    assert printed[3] == "step 20: saved run/checkpoints/20 in 1.50 s, training was blocked for 0.25 s"
    assert printed[4] == "step 20: rolled back to the checkpoint of step 15; left out: batch 16, 17"


def test_a_terminal_gets_a_bar(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    progress = Progress(config)
    start(progress, config, step=10)
    steps(progress, 11, 14)
    assert progress._bar.n == 14 and "comm 20.0%" in progress._bar.postfix
    progress.hvdlm_run_ended({})
    assert progress._bar is None


def test_tensorboard_reads_events_of_an_unclosed_file(config: Config) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    board = TensorBoard(config)
    start(board, config)
    steps(board, 1, 5)
    board.hvdlm_evaluated(5, {"val_loss": 2.5, "perplexity": 12.0})
    (file,) = (Path(config.log.run) / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]
    values = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert {step for step, _ in values} == {1, 5}
    assert values[5, "train/tokens_per_second"] == 200 and values[5, "comm/bytes"] == 4000
    assert values[5, "val/loss"] == 2.5 and values[5, "comm/share"] == pytest.approx(0.2)


def test_tensorboard_events_need_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys; from types import SimpleNamespace as N; from hvdlm.config import Config\n"
        "from hvdlm_telemetry.tensorboard import TensorBoard\n"
        f"config = Config(); config.log.run = {str(tmp_path)!r}; board = TensorBoard(config)\n"
        "board.hvdlm_run_started(config, N(rank=0), {'start_step': 0, 'parameters': 1})\n"
        "board.hvdlm_evaluated(1, {'val_loss': 1.0})\n"
        "board.hvdlm_run_ended({}); bad = {'torch', 'tensorflow', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr


def test_importing_telemetry_loads_nothing_heavy() -> None:
    code = (
        "import sys; from hvdlm.telemetry import default_plugins; from hvdlm.config import Config\n"
        "default_plugins(Config())\n"
        "bad = {'tensorboard', 'tqdm', 'psutil'} & set(sys.modules); assert not bad, bad"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr


def test_peak_memory_is_in_bytes() -> None:
    assert 5e6 < peak_memory_bytes() < 1e12


def test_waiting_for_data_is_a_figure_of_the_log(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, progress = Metrics(config), Progress(config)
    for plugin in (metrics, progress):
        start(plugin, config)
        for step in range(1, 6):
            end_step(plugin, step, StepResult(1.0, 100.0, 0.5, data_seconds=0.01 * step))
    assert lines(config)[0]["data_share"] == pytest.approx(0.02) and lines(config)[0]["mfu"] is None
    assert lines(config)[1]["data_seconds"] == pytest.approx(0.035)  # the mean of steps 2 to 5
    assert ", data 2.0%, " in capsys.readouterr().out


def test_the_share_of_a_known_peak_and_memory_are_logged(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, progress = Metrics(config), Progress(config)
    for plugin in (metrics, progress):
        start(plugin, config)
        plugin.summed = Rates(8000, peak_tokens_per_second=800.0)
        end_step(plugin, 1, StepResult(1.0, 100.0, 0.5, device_memory_peak=5 * 10**9))
    assert lines(config)[0]["mfu"] == pytest.approx(0.25) and lines(config)[0]["device_memory_peak"] == 5 * 10**9
    assert ", MFU 25.0%, 5 GB, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
        ("AMD EPYC 7763", "fp32", None),
    ],
)
def test_peak_rates_are_those_of_the_data_sheets(name: str, precision: str, expected: float | None) -> None:
    assert Peaks().hvdlm_peak_flops(name, precision) == expected


def test_ranks_that_share_a_device_share_its_peak() -> None:
    """Two ranks on one GPU and one on another: the peak of two GPUs; a rank without a GPU: no peak is known."""

    def total(identities: list[str | None]) -> Any:
        def of_rank(world: Any) -> float | None:
            identity = identities[world.rank]
            resolved = Resolved("NVIDIA H200", identity, "bf16") if identity else Resolved()
            manager = plugins.load([])
            manager.register(Peaks())
            spec = SimpleNamespace(flops_per_token=1e9)
            config = SimpleNamespace(train=SimpleNamespace(precision="bf16"))
            run: Any = SimpleNamespace(resolved=resolved, config=config, manager=manager, world=world, spec=spec)
            return peak_tokens_per_second(run)

        return ThreadRanks(3).run(of_rank)

    assert total(["a", "a", "b"]) == [2 * 989.4e3] * 3
    assert total(["a", None, "b"]) == [None] * 3
