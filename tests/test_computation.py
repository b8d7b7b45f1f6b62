"""What a run computes with: precision, compilation and device, asked for or left to the machine."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from builders import ThreadRanks, both_frameworks, configured_spec, edit_json, read_json, small_config
from hvdlm import plugins
from hvdlm.config import Config, TrainConfig
from hvdlm.configuration.parsing import parse_config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.protocols.framework import Resolved
from hvdlm.training import preflight
from hvdlm_backends.local import LocalWorld
from hvdlm_testing.checks.harness import Findings
from hvdlm_testing.checks.models import check_resolved
from launching import ONE_LAYER, SMALL, launch, metrics, run_python

H100, V100 = ("NVIDIA H100 80GB HBM3", (9, 0)), ("Tesla V100-SXM2-16GB", (7, 0))
FP32_PRODUCTS = ("fp32 products in fp32",)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that shows GPUs, of a name and a compute capability, to a framework."""

    def show(framework: str, name: str, capability: tuple[int, int], count: int = 1) -> None:
        if framework == "torch":
            import torch

            stubs = {
                "is_available": True,
                "device_count": count,
                "set_device": None,
                "get_device_properties": SimpleNamespace(name=name, uuid="GPU-1"),
                "get_device_capability": capability,
            }
            for function, value in stubs.items():
                monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
            monkeypatch.setattr(importlib.import_module("hvdlm_torch.compiler"), "missing", lambda device: "")
        else:
            import tensorflow as tf

            gpus = [SimpleNamespace(name=f"GPU:{number}") for number in range(count)]
            details = {"device_name": name, "compute_capability": capability}
            monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
            monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)
            experimental = tf.config.experimental
            monkeypatch.setattr(experimental, "set_memory_growth", lambda *_: None)
            monkeypatch.setattr(experimental, "get_device_details", lambda _: details)

    yield show
    if "torch" in sys.modules:  # their defaults
        sys.modules["torch"].backends.cuda.matmul.allow_tf32 = False
        sys.modules["torch"].backends.cudnn.allow_tf32 = True
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.experimental.enable_tensor_float_32_execution(True)


def resolve(framework: str, world: Any = None, model: str = "gpt", sizes: Any = None, **train: Any) -> Resolved:
    """Return what a framework resolves for a small model; ``train``: options."""
    config = small_config(framework, model, **sizes or {})
    for name, value in train.items():
        setattr(config.train, name, value)
    made = plugins.make(plugins.load([framework]), "framework", framework)
    return made.resolve(config, configured_spec(config), world or LocalWorld())


def multiplies_in_tf32(framework: str) -> bool:
    """Return whether the framework's fp32 products on GPUs are in TF32."""
    if framework == "torch":
        import torch

        allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        assert len(allowed) == 1
        return allowed.pop()
    import tensorflow as tf

    return bool(tf.config.experimental.tensor_float_32_execution_enabled())


@both_frameworks
def test_auto_follows_what_the_gpu_can_do(framework: str, fake_gpu: Any) -> None:
    fake_gpu(framework, *H100)
    compiled = framework == "torch"  # in TensorFlow, compiled steps were not measured on GPUs
    resolved = resolve(framework)
    assert resolved == Resolved(H100[0], resolved.identity, "bf16", True, compiled, ("fp32 products in TF32",))
    assert resolved.identity  # of the GPU
    fake_gpu(framework, *V100)
    assert resolve(framework) == replace(resolved, device=V100[0], precision="fp32", tf32=False, notes=FP32_PRODUCTS)


@both_frameworks
def test_tf32_is_an_option_of_gpus(framework: str, fake_gpu: Any) -> None:
    fake_gpu(framework, *H100)
    for wanted in (False, True):
        resolved = resolve(framework, tf32=wanted)
        assert resolved.notes[0] == f"fp32 products in {'TF32' if wanted else 'fp32'}" and resolved.tf32 is wanted
        assert multiplies_in_tf32(framework) is wanted


@both_frameworks
def test_what_is_asked_for_is_kept_on_a_gpu(framework: str, fake_gpu: Any) -> None:
    fake_gpu(framework, *H100)
    assert resolve(framework, compile=True).compile and not resolve(framework, compile=False).compile
    resolved = resolve(framework, precision="fp32")
    assert [preflight.precision(asked, resolved, None) for asked in ("auto", "fp32", "fp16")] == [
        "bf16",
        "fp32",
        "fp16",
    ]


@both_frameworks
def test_local_ranks_have_the_gpus_in_turn(framework: str, fake_gpu: Any) -> None:
    fake_gpu(framework, *H100, count=2)
    devices = importlib.import_module(f"hvdlm_{framework}.devices")
    selected = [devices.select(LocalWorld(local_rank), small_config(framework)) for local_rank in range(4)]
    numbers = [device.index if framework == "torch" else int(device.name[-1]) for device in selected]
    assert numbers == [0, 1, 0, 1]


@both_frameworks
def test_a_cpu_computes_in_fp32(framework: str) -> None:
    assert resolve(framework) == Resolved("CPU", "", "fp32", False, False, ())
    assert resolve(framework, compile=True).compile
    with pytest.raises(HvdlmError, match=r"train\.precision fp16 needs a GPU, and none is visible here"):
        resolve(framework, precision="fp16")


def test_torch_compiles_on_gpus_what_was_measured(fake_gpu: Any) -> None:
    fake_gpu("torch", *H100)
    assert resolve("torch", compile=None).compile and not resolve("torch", model="lstm").compile
    config = small_config("torch")
    config.parallel.tensor = 2
    made = plugins.make(plugins.load(["torch"]), "framework", "torch")
    for recomputes in (False, True):  # which ranks that share a model can't
        config.train.activation_checkpointing = recomputes
        assert made.resolve(config, configured_spec(config), LocalWorld()).compile is not recomputes
    assert not resolve("torch", compile=None, activation_offload=True).compile  # which leaves layer by layer


class Doubling:
    def double(self, x: Any) -> Any:
        return x + x


def test_every_model_of_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hvdlm_torch import compiler

    phases: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        phases.append(process.phase.name)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    before = process.phase.name
    for _ in range(10):
        assert compiler.compiled(Doubling().double)(torch.ones(2)).tolist() == [2.0, 2.0]
    # Watchdogs see each time that this rank compiles.
    assert phases == ["compiling a step"] * 10 and process.phase.name == before


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_compiling_lacks_is_named(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from hvdlm_torch import compiler

    device = torch.device(kind)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("CPATH", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert "Python's headers (Python.h), which are not installed" in compiler.missing(device)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path / 'given'}")
    assert compiler.missing(device) == ""
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert compiler.missing(device) == ("" if kind == "cpu" else "triton, which is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    names = {"cpu": "g++", "cuda": "gcc or clang"}[kind]
    assert compiler.missing(device) == f"a compiler, and {names} is not on PATH"


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"precision": "bf16"}, r"rank 1 has another train.precision than rank 0 \(bf16, not fp32\): their devices"),
        ({"compile": True}, r"train.compile than rank 0 \(true, not false\): .*, set --train.compile false\."),
    ],
)
def test_ranks_that_resolve_differently_are_refused(other: dict[str, Any], sentence: str) -> None:
    task: Any = SimpleNamespace(tokenizer=SimpleNamespace(hash="t"), fingerprint="d")
    errors = ThreadRanks(2).run(
        lambda world: preflight.agree(world, Config(), task, None, Resolved(**other if world.rank else {}))
    )
    for error in errors:
        with pytest.raises(HvdlmError, match=sentence):
            raise error


# Rank 1 has a GPU, as far as options are resolved; the others have none.
UNEQUAL = """
import importlib, os, sys
from hvdlm import cli
from hvdlm.protocols.framework import Resolved
from hvdlm_backends.local import LocalWorld
devices = importlib.import_module(f"hvdlm_{sys.argv.pop(1)}.devices")
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    devices.resolve = lambda *_: Resolved("NVIDIA H100", precision="bf16")
sys.exit(cli.main())
"""


@both_frameworks
def test_one_rank_with_a_gpu_ends_the_launch(framework: str, tmp_path: Path) -> None:
    options = [*SMALL, "--framework", framework, "--backend", "mpi4py", "--log.run", str(tmp_path / "run")]
    done = launch("mpirun", 2, ["-c", UNEQUAL, framework, *options])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("rank 1 has another train.precision than rank 0 (bf16, not fp32)") == 1
    assert "set --train.precision fp32." in done.stderr


RUNS = "import json, sys; from hvdlm import cli\nfor one in json.loads(sys.argv[1]): assert cli.main(one) == 0, one"


def train(run: Path, framework: str, *lines: list[str]) -> list[str]:
    """Train in ``run`` with these options, line by line in one process; return the lines that were printed."""
    options = [*SMALL, *ONE_LAYER, "--framework", framework, "--log.run", str(run), "--train.eval_every", "0"]
    commands = [["train", *options, *line] for line in lines]
    done = run_python(["-c", RUNS, json.dumps(commands), "--framework", framework])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@both_frameworks
def test_a_resumed_run_keeps_the_precision_of_another_device(framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = train(run, framework, ["--train.steps", "1", "--train.precision", "bf16"])
    assert printed[0] == "hvdlm: precision bf16, compile off, device CPU"
    manifest = run / "checkpoints" / "step-00000001" / "manifest.json"
    assert read_json(manifest)["device"] == "CPU" and read_json(manifest)["config"]["train"]["precision"] == "bf16"
    edit_json(manifest, lambda content: content.update(device=H100[0]))
    resume = ["--checkpoint.resume", "auto", "--train.precision", "auto", "--train.steps"]
    lines = train(run, framework, [*resume, "2"], [*resume, "3"])
    sentence = (
        f"hvdlm: the precision stays bf16, as the checkpoint was trained on {H100[0]}; --train.precision fp32 is what "
        "auto would choose on this CPU"
    )
    assert lines[:2] == ["hvdlm: precision bf16, compile off, device CPU", sentence]
    assert lines.count(sentence) == 1  # the second checkpoint is of this device
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["precision"] == "bf16"
    assert read_json(run / "summary.json")["precision"] == "bf16"


@both_frameworks
def test_what_auto_resolves_to_is_stored(framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, framework, ["--train.steps", "1"])[0] == "hvdlm: precision fp32, compile off, device CPU"
    stored = yaml.safe_load((run / "config.yaml").read_text())["train"]
    in_manifest = read_json(run / "checkpoints" / "step-00000001" / "manifest.json")["config"]["train"]
    for options in (stored, in_manifest):
        assert options["precision"] == "fp32" and options["compile"] == "auto" and options["tf32"] is True
    summary = read_json(run / "summary.json")
    assert (summary["precision"], summary["compile"], summary["device"]) == ("fp32", False, "CPU")


@pytest.mark.parametrize(
    ("resolved", "fault"),
    [
        (Resolved(precision="auto"), "the precision 'auto' for auto, expected fp32 or bf16"),
        (Resolved(compile=None), "compile None, expected a bool"),  # type: ignore[arg-type]
        (Resolved(device=""), "expected texts"),
    ],
)
def test_conformance_covers_what_a_framework_resolves(resolved: Resolved, fault: str) -> None:
    config, findings = small_config("torch"), Findings()
    for answer in (Resolved(), resolved):
        framework: Any = SimpleNamespace(name="made", resolve=lambda *_, answer=answer: answer)
        check_resolved(framework, config, configured_spec(config), LocalWorld(), findings)
    assert len(findings.faults) == 1 and fault in findings.faults[0]


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("null", None), ("true", True), ("false", False)])
def test_compile_is_auto_true_or_false(text: str, value: Any) -> None:
    assert parse_config(["--train.compile", text]).train.compile == value
    with pytest.raises(HvdlmError, match=r"train\.compile: got 'maybe', expected true or false or auto or null"):
        parse_config(["--train.compile", "maybe"])


@pytest.mark.parametrize("config", [None, {}, {"train": None}, {"train": []}, {"train": {"precision": 3}}])
def test_a_checkpoint_without_a_precision_has_none_to_keep(config: Any) -> None:
    checkpoint: Any = SimpleNamespace(manifest={} if config is None else {"config": config})
    assert preflight.precision("auto", Resolved(precision="bf16"), checkpoint) == "bf16"
    checkpoint.manifest["config"] = {"train": {"precision": "fp32"}}
    assert preflight.precision("auto", Resolved(precision="bf16"), checkpoint) == "fp32"


@pytest.mark.parametrize(
    ("asked", "before", "expected"),
    [
        ({}, {"learning_rate": 1e-3, "min_learning_rate": 1e-4}, 1e-4),
        ({"learning_rate": 2e-3}, {"learning_rate": 2e-3, "min_learning_rate": 1e-4}, 1e-4),  # an earlier version's
        ({"learning_rate": 2e-3}, {"learning_rate": 2e-3, "min_learning_rate": None}, None),
        ({"learning_rate": 1e-5}, {"learning_rate": 1e-3, "min_learning_rate": 1e-4}, None),  # another peak
        ({"min_learning_rate": 0.0}, {"learning_rate": 1e-3, "min_learning_rate": 1e-4}, 0.0),  # as asked for
        ({}, {"learning_rate": 1e-3, "min_learning_rate": "x"}, None),
        ({}, {"learning_rate": 1e-3, "min_learning_rate": math.nan}, None),
        ({}, None, None),
    ],
)
def test_a_resumed_run_keeps_the_minimum_of_its_checkpoint(asked: Any, before: Any, expected: Any) -> None:
    checkpoint: Any = SimpleNamespace(manifest={"config": {"train": before}})
    assert preflight.min_learning_rate(TrainConfig(**asked), checkpoint) == expected
    assert preflight.min_learning_rate(TrainConfig(**asked), None) == TrainConfig(**asked).min_learning_rate


def test_a_run_of_an_earlier_version_ends_at_its_minimum(tmp_path: Path) -> None:
    """It had 0.0001 by default, which is no tenth of its learning rate."""
    run, rate = tmp_path / "run", ["--train.learning_rate", "2e-3", "--train.schedule", "linear", "--train.warmup", "0"]
    train(run, "torch", [*rate, "--train.steps", "2"])
    manifest = run / "checkpoints" / "step-00000002" / "manifest.json"
    edit_json(manifest, lambda content: content["config"]["train"].update(min_learning_rate=1e-4))
    train(run, "torch", [*rate, "--train.steps", "4", "--checkpoint.resume", "auto"])
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "learning_rate" in line}
    assert rates[4] == pytest.approx(1e-4 + 1.9e-3 / 4)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["min_learning_rate"] == 1e-4
