"""Plugins that steer a run, and that bring optimizers, learning-rate schedules and tokenizers of the documents."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_snippets import blocks

import hvdlm
from builders import file_names, read_json
from hvdlm.data.tokenizers import find_kind
from hvdlm.errors import RankError
from hvdlm.training.run_control import RunControl
from hvdlm_backends.local import LocalWorld
from hvdlm_steering import samples
from hvdlm_steering.early_stopping import EarlyStopping, EarlyStoppingOptions
from launching import ONE_LAYER, ROOT, SMALL, STEPS, launch, losses, metrics, run_python

STEER = """
import threading

from hvdlm import hookimpl

state = threading.local()  # of each rank, where ranks are threads


@hookimpl
def hvdlm_run_started(world, run):
    state.run = run if world.rank == world.size - 1 else None


@hookimpl
def hvdlm_step_ended(step):
    if state.run:
        requests = {3: state.run.save, 5: state.run.evaluate, 7: lambda: state.run.stop("it is enough")}
        requests.get(step, lambda: None)()
"""
OWN_SGD = """
from hvdlm import hookimpl


class Momentum:
    state = ("momentum",)
    decoupled = False

    def __init__(self, train):
        self.factor = train.momentum

    def update(self, parameters, gradient, state, learning_rate, step):
        from keras import ops

        momentum = self.factor * state["momentum"] + gradient
        return parameters - learning_rate * momentum, {"momentum": ops.convert_to_tensor(momentum)}


@hookimpl
def hvdlm_optimizers():
    return {"own_sgd": Momentum}
"""
BUNDLE = """
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdlm import hookimpl
from hvdlm.data.tokenizers import ByteTokenizer


@dataclass
class Shares:
    \"\"\"Shares.

    Args:
        weights: by name
    \"\"\"

    weights: dict[str, float] = field(default_factory=dict)


class Octets(ByteTokenizer):
    load = train = staticmethod(lambda *_: Octets())

    def to_json(self):
        return {"kind": "octets"}


@hookimpl
def hvdlm_options():
    return {"shares": Shares}


@hookimpl
def hvdlm_tokenizers():
    return {"octets": Octets}


@hookimpl
def hvdlm_lr_schedules():
    return {"second": lambda train: lambda step: 1e-3}
"""
TAKEN = """
from hvdlm import hookimpl


@hookimpl
def hvdlm_optimizers():
    return {"adamw": None}


@hookimpl
def hvdlm_lr_schedules():
    return {"second": None}


@hookimpl
def hvdlm_models():
    return {"gpt": None}


@hookimpl
def hvdlm_compressors():
    return {"top_k": None}


@hookimpl
def hvdlm_tokenizers():
    return {"word": None}
"""
DOCUMENTED = {
    name: next(block.code for block in blocks((ROOT / "docs" / "plugins.md").read_text()) if hook in block.code)
    for name, hook in {
        "lion": "def hvdlm_optimizers", "late_decay": "def hvdlm_lr_schedules", "pairs": "def hvdlm_tokenizers"
    }.items()
}  # fmt: skip
SMALL_OPTIONS = {
    "model": {"layers": 1, "width": 16, "heads": 2},
    "data.context": 16,
    "data.validation_share": 0.02,
    "train": {"batch_size": 8, "warmup": 2},
    "log": {"every": 1, "progress": False, "tensorboard": False},
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for ``PYTHONPATH`` in which the plugins are installed."""
    folder = tmp_path_factory.mktemp("installed")
    modules = {"steer": STEER, "own_sgd": OWN_SGD, "bundle": BUNDLE, "taken": TAKEN, **DOCUMENTED}
    (folder / "steering-1.dist-info").mkdir()
    (folder / "steering-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: steering\nVersion: 1\n")
    entries = "".join(f"{name} = {name}_plugin\n" for name in modules)
    entries += "second = bundle_plugin\nword = taken_plugin\n"
    (folder / "steering-1.dist-info" / "entry_points.txt").write_text(f"[hvdlm]\n{entries}")
    for name, code in modules.items():
        (folder / f"{name}_plugin.py").write_text(code)
    return folder


def with_path(folder: Path) -> str:
    """Return PYTHONPATH with ``folder`` first."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def discovered(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make this process discover the installed plugins."""
    monkeypatch.syspath_prepend(str(installed))
    importlib.invalidate_caches()
    find_kind.cache_clear()
    yield installed
    find_kind.cache_clear()


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_plugin_on_one_rank_steers_all_ranks(
    framework: str, installed: Path, tmp_path: Path, curve: Callable[..., Path]
) -> None:
    plain = curve(framework, 2, *STEPS, *ONE_LAYER)
    options = (plain / "config.yaml", "--plugins", "[steer]", "--log.run", tmp_path / "run", "--checkpoint.keep", "9")
    arguments = ["-m", "hvdlm", "--config", *map(str, options)]
    done = launch("threads", 2, arguments, PYTHONPATH=with_path(installed))
    assert done.returncode == 0, done.stderr[-3000:]
    status, summary = read_json(tmp_path / "run" / "status.json"), read_json(tmp_path / "run" / "summary.json")
    assert (status["state"], status["reason"], status["step"], status["code"]) == ("done", "it is enough", 8, 0)
    assert summary["ended_early"] == "it is enough" and summary["stopped"] is None and summary["steps"] == 8
    assert "the run ends after step 8: it is enough" in done.stdout
    assert file_names(tmp_path / "run" / "checkpoints") == ["latest", "step-00000004", "step-00000008"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [6, 8]
    assert losses(tmp_path / "run") == losses(plain)[:8]


def test_requests_wait_for_the_synchronisation_of_diloco(
    installed: Path, tmp_path: Path, curve: Callable[..., Path]
) -> None:
    options = (
        "--config",
        curve("torch", 2, *STEPS, *ONE_LAYER) / "config.yaml",
        "--plugins",
        "[steer]",
        "--log.run",
        tmp_path / "run",
    )
    options += ("--communication.exchange", "diloco", "--communication.local.steps", "4", "--checkpoint.keep", "9")
    done = launch("threads", 2, ["-m", "hvdlm", *map(str, options)], PYTHONPATH=with_path(installed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the run ends after step 8: it is enough" in done.stdout
    assert file_names(tmp_path / "run" / "checkpoints") == ["latest", "step-00000004", "step-00000008"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "val_loss" in line] == [8]


def train(folder: Path, *options: dict) -> hvdlm.Result:
    """Train a small run in this process."""
    return hvdlm.train(hvdlm.Config.load(SMALL_OPTIONS, {"log.run": folder}, *options))


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_an_optimizer_of_a_plugin_trains_as_the_built_in_one(framework: str, installed: Path, tmp_path: Path) -> None:
    options = {"framework": framework, "data.tokenizer": "pairs", "parallel.zero": 1, "train.steps": 10}
    options |= {"train.schedule": "late_decay", "train.momentum": 0.9, "train.learning_rate": 0.05}
    program = f"""
import hvdlm
for optimizer in ("sgd", "own_sgd"):
    options = {options!r} | {{"train.optimizer": optimizer, "log.run": {str(tmp_path)!r} + "/" + optimizer}}
    run = hvdlm.train(hvdlm.Config.load({SMALL_OPTIONS!r}, options), ranks=2).run
text = hvdlm.load(run).generate("The ", 10)
assert len(text) == 24, text
"""
    done = run_python(["-c", program, "--framework", framework], PYTHONPATH=with_path(installed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "own_sgd") == pytest.approx(losses(tmp_path / "sgd"), abs=2e-6)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "own_sgd") if "loss" in line]
    assert rates[2:] == pytest.approx([0.05] * 7 + [0.05 - (0.05 - 0.005) / 2]) and rates[0] < rates[1] < 0.05
    assert read_json(tmp_path / "own_sgd" / "tokenizer.json")["kind"] == "pairs"


def test_plugins_of_the_documents_conform(installed: Path, tmp_path: Path) -> None:
    chosen = [option for name in DOCUMENTED for option in ("--hvdlm-plugin", name)]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = run_python(command, cwd=tmp_path, timeout=600, PYTHONPATH=with_path(installed), HVDLM_TEST_FRAMEWORK="torch")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_lion_of_the_documents_lowers_the_loss(installed: Path, tmp_path: Path) -> None:
    # In processes of its own: keras may have been loaded for another framework in this one.
    command = ["-m", "hvdlm", *SMALL, "--train.optimizer", "lion", "--train.learning_rate", "3e-3"]
    command += ["--train.warmup", "2", "--log.run", str(tmp_path / "run"), "--train.steps"]
    for steps, resume in (("30", "none"), ("31", "auto")):
        done = run_python([*command, steps, "--checkpoint.resume", resume], PYTHONPATH=with_path(installed))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    curve = losses(tmp_path / "run")
    assert len(curve) == 31 and curve[29] < curve[0] - 0.5


@pytest.mark.parametrize(
    "option, name, sentence",
    [
        ("train.optimizer", "adam", "did you mean adamw? Known: adagrad, adamw, lion, muon, own_sgd, sgd."),
        ("train.schedule", "cosin", "did you mean cosine? Known: constant, cosine, inverse_sqrt, late_decay, linear,"),
        ("data.tokenizer", "pair", "did you mean pairs? Known: bpe, byte, char, ids, octets, pairs, word."),
    ],
)
def test_an_unknown_name_is_refused_with_all_that_are_there(
    option: str, name: str, sentence: str, discovered: Path, tmp_path: Path
) -> None:
    with pytest.raises(hvdlm.HvdlmError) as raised:
        train(tmp_path / "run", {option: name})
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, "models: 'gpt' is provided by gpt and by taken"),
        ({"model.name": "lstm"}, "optimizers: 'adamw' is provided by hvdlm and by taken"),
        ({"model.name": "lstm", "train.optimizer": "sgd", "train.schedule": "second"}, "lr_schedules: 'second' is pro"),
        (
            {"train.optimizer": "sgd", "communication.compression.algorithm": "top_k", "model.name": "lstm"},
            "compressors: 'top_k' is provided by compression and by taken",
        ),
        ({"plugins": [], "data.tokenizer": "word"}, "tokenizers: 'word' is provided by corpora and by word"),
    ],
    ids=str,
)
def test_a_name_that_is_provided_twice_is_refused(
    options: dict, sentence: str, discovered: Path, tmp_path: Path
) -> None:
    with pytest.raises(hvdlm.HvdlmError) as raised:
        train(tmp_path / "run", {"plugins": ["taken"]} | options)
    assert sentence in str(raised.value) and "rename one of them" in str(raised.value)


def test_a_plugin_has_several_names_and_mappings_as_options(discovered: Path, tmp_path: Path) -> None:
    weights = {"a.txt": 1.0, "b": 0.5}
    options = {"plugins": ["bundle", "second"], "shares": {"weights": weights}, "train.steps": 2}
    options |= {"data.tokenizer": "octets", "train.schedule": "second", "log.run": tmp_path / "run"}
    config = hvdlm.Config.load(SMALL_OPTIONS, options)
    assert hvdlm.Config.load(config, {"train.seed": 2}).plugin_options["shares"].weights == weights
    with hvdlm.load(hvdlm.train(config).run, {"shares": {"weights": {"c": 2.0}}}) as run:
        assert run.config.plugin_options["shares"].weights == {"c": 2.0} and len(run.generate("The ", 3)) >= 5


EARLY = {"plugins": ["early_stopping"], "train.eval_every": 2, "early_stopping.patience": 2}


def test_early_stopping_ends_a_run_that_improves_no_more(tmp_path: Path) -> None:
    never = EARLY | {"early_stopping.min_improvement": 100.0, "train.steps": 50}
    result = train(tmp_path / "run", never)
    assert result.status == "done" and result.steps == 7  # evaluations after 2, 4 and 6 steps, and one step to agree
    assert str(result.reason).startswith("early_stopping: val_loss has not improved on ")
    assert read_json(tmp_path / "run" / "status.json")["reason"] == result.reason
    improving = EARLY | {"early_stopping.min_improvement": 0.0, "train.steps": 8, "train.learning_rate": 0.01}
    assert train(tmp_path / "improving", improving).reason is None


def test_a_resumed_run_counts_earlier_evaluations(tmp_path: Path) -> None:
    never = EARLY | {"early_stopping.min_improvement": 100.0, "checkpoint.resume": "auto"}
    assert train(tmp_path / "run", never, {"train.steps": 4}).steps == 4
    assert train(tmp_path / "run", never, {"train.steps": 50}).steps == 7


class Counting(EarlyStopping):
    """Early stopping on rank 0 of a run that was opened from ``checkpoint``."""

    def __init__(self, patience: int, checkpoint: Path | None = None, start: int = 0) -> None:
        super().__init__()
        opened = SimpleNamespace(world=LocalWorld(), checkpoint=checkpoint and SimpleNamespace(path=checkpoint))
        self.control = RunControl(opened)  # type: ignore[arg-type]
        config = hvdlm.Config(plugin_options={"early_stopping": EarlyStoppingOptions(patience)})
        self.hvdlm_run_started(config, LocalWorld(), {"start_step": start}, self.control)

    def stops_at(self, losses: dict[int, float]) -> int | None:
        """Return the first step at which it asks to stop."""
        for step, loss in losses.items():
            self.hvdlm_evaluated(step, {"val_loss": loss})
            if self.control.take_requests()[0]:
                return step
        return None


def test_a_loss_that_is_not_a_number_is_no_improvement() -> None:
    nan = float("nan")
    assert Counting(2).stops_at({1: nan, 2: nan, 3: 1.0}) == 2
    assert Counting(2).stops_at({1: 2.0, 2: nan, 3: 1.0, 4: nan, 5: nan}) == 5
    assert Counting(2).stops_at({1: float("inf"), 2: 1.0, 3: 0.5}) is None


def test_a_rollback_takes_evaluations_back() -> None:
    counting = Counting(3)
    assert counting.stops_at({2: 1.0, 4: 2.0, 6: 2.0}) is None
    counting.hvdlm_rolled_back(4)
    assert counting.stops_at({6: 2.0}) is None and counting.stops_at({8: 2.0}) == 8


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/set-aside-1"])
def test_evaluations_are_those_of_the_checkpoint_s_run(folder: str, tmp_path: Path) -> None:
    lines = ['{"step": 2, "val_loss": 1.0}', '{"step": 4, "val_loss": 3', '{"step": 4, "val_loss": null}']
    lines += ['{"val_loss": 0.1}', "[]", '{"step": 6, "val_loss": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    counting = Counting(3, tmp_path / folder / "step-00000004", 4)
    assert counting.stops_at({6: 1.5, 8: 0.9}) is None  # 4 and 6 are no improvements, 8 is
    assert Counting(3, tmp_path / folder / "step-00000004", 4).stops_at({6: 1.5, 8: 1.1}) == 8


def test_early_stopping_needs_the_metric_that_it_compares() -> None:
    with pytest.raises(hvdlm.HvdlmError, match="early_stopping compares val_loss, which this task doesn't measure"):
        Counting(1).hvdlm_evaluated(1, {"accuracy": 0.5})


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": -1}, {"min_improvement": float("inf")}], ids=str)
def test_early_stopping_checks_its_options(options: dict) -> None:
    config = hvdlm.Config(plugin_options={"early_stopping": EarlyStoppingOptions(**options)})
    with pytest.raises(hvdlm.HvdlmError, match=f"early_stopping.{next(iter(options))} is "):
        EarlyStopping().hvdlm_check(config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_ranks, expected", [(1, RuntimeError), (2, RankError)])
def test_a_failed_sample_ends_runs_that_share_the_model(model_ranks: int, expected: type) -> None:
    """Other errors than RankError are reported, and the run continues."""
    plugin, mesh = samples.Samples(), SimpleNamespace(tensor=model_ranks, pipeline=1)
    plugin._run = SimpleNamespace(opened=SimpleNamespace(mesh=mesh), generate=lambda *_, **__: 1 / 0)  # type: ignore
    with pytest.raises(expected, match="no sample could be generated: division by zero"):
        plugin.hvdlm_run_ended({"stopped": None, "steps": 5})
    assert plugin.observer


def test_a_sample_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"task": "digits", "model": {"name": "convnet", "layers": 1, "width": 8}, "train.eval_every": 1}
    options |= {"plugins": ["samples"], "log.sample_tokens": 5, "log.sample_prompt": "none.idx", "train.steps": 2}
    result = train(tmp_path / "digits", options)
    (warning,) = read_json(result.run / "status.json")["warnings"]
    assert result.status == "done" and "no sample could be generated: none.idx: " in warning

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(samples, "replace", full)
    result = train(tmp_path / "run", {"log.sample_tokens": 5, "log.sample_prompt": "The ", "train.steps": 1})
    assert result.status == "done" and "sample.txt" in read_json(result.run / "status.json")["warnings"][0]


def test_samples_are_printed_at_every_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = {"log.sample_tokens": 12, "log.sample_prompt": "The ", "train.steps": 4, "train.eval_every": 2}
    train(tmp_path / "end", sampled)
    assert capsys.readouterr().out.count("The ") == 1
    text = (tmp_path / "end" / "sample.txt").read_text()
    assert text.startswith("The ") and len(text) == 16
    train(tmp_path / "every", sampled, {"plugins": ["samples"]})
    printed = capsys.readouterr().out
    assert printed.count("The ") == 2 and text in printed and (tmp_path / "every" / "sample.txt").read_text() == text
    with pytest.raises(hvdlm.HvdlmError, match=r"log\.sample_tokens"):
        train(tmp_path / "none", {"plugins": ["samples"]})


def test_requests_travel_once_and_a_stop_until_the_end() -> None:
    control = RunControl(SimpleNamespace(world=LocalWorld()))  # type: ignore[arg-type]
    assert control.take_requests() == (False, False, False)
    control.save()
    control.evaluate()
    control.stop("first")
    control.stop("second")
    assert control.take_requests() == (True, True, True) and control.take_requests() == (True, False, False)
    assert control.agreed_reason() == "first"


def test_what_is_asked_for_between_synchronisations_waits() -> None:
    exchange = SimpleNamespace(agreed=False)
    control = RunControl(SimpleNamespace(world=LocalWorld(), exchange=exchange))  # type: ignore[arg-type]
    assert control.due(1, 1, 0) == (0, False, False) and control.due(1, 0, 1) == (0, False, False)
    exchange.agreed = True
    assert control.due(1, 0, 0) == (1, True, True) and control.due(0, 0, 0) == (0, False, False)
    control.stop("")
    assert control.take_requests()[0] and control.agreed_reason() == ""
