"""MLflow and Weights & Biases hear what a run tells; their own readers find it again. Servers that fail end no run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.types import StepResult
from hvdlm_trackers import tracker
from hvdlm_trackers.mlflow import MLflow, MLflowOptions
from hvdlm_trackers.sender import Sender
from hvdlm_trackers.wandb import WandbOptions, WeightsAndBiases
from launching import SMALL, launch

BOTH = all(tracker.installed(name) for name in ("mlflow", "wandb"))
needs_both = pytest.mark.skipif(not BOTH, reason="needs the extras mlflow and wandb: pip install hvdlm[mlflow,wandb]")
SHORT = [*SMALL, "--log.every", "2", "--train.warmup", "2", "--train.eval_every", "5", "--log.tensorboard", "false"]
KEYLESS = {"WANDB_API_KEY": "", "NETRC": "/dev/null"}


def train(run: Path, steps: int, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks with both trackers."""
    command = ["-m", "hvdlm", "--plugins", "[mlflow,wandb]", "--log.run", str(run), *SHORT]
    command += ["--train.steps", str(steps), *options]
    done = launch("mpirun", 2, command, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return a run of 6 steps that went on to 10, and where both trackers kept it."""
    folder = tmp_path_factory.mktemp("tracked")
    places = ["--mlflow.tracking_uri", str(folder / "ml"), "--mlflow.experiment", "small", "--wandb.mode", "offline"]
    run = folder / "run"
    train(run, 6, *places)
    first = {name: json.loads((run / f"{name}.json").read_text()) for name in ("mlflow", "wandb")}
    train(run, 10, *places, "--checkpoint.resume", "auto", "--wandb.name", "renamed")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(run=run, store=folder / "ml", first=first, lines=lines)


def logged(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


@needs_both
def test_mlflow_has_one_run_with_every_figure_of_both_parts(
    tracked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=str(tracked.store))
    experiment = client.get_experiment_by_name("small")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == tracked.first["mlflow"]["run_id"]
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["model.width"] == "32" and found.data.tags["hvdlm.world_size"] == "2"
    assert found.data.tags["hvdlm.state"] == "done" and "hvdlm.versions.torch" in found.data.tags
    for name in ("loss", "val_loss", "comm_bytes"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == logged(tracked.lines, name), name
    assert len(logged(tracked.lines, "loss")) == 6  # steps 1, 2, 4, 6, 8, 10: as log.every says
    files = Path(found.info.artifact_uri.removeprefix("file://"))
    summary = json.loads((files / "summary.json").read_text())
    assert summary == json.loads((tracked.run / "summary.json").read_text())
    assert found.data.metrics["summary/tokens_per_second"] == summary["tokens_per_second"]
    assert yaml.safe_load((files / "config.yaml").read_text())["train"]["steps"] == 10


def records(path: Path) -> Iterator[Any]:
    """Yield what wandb wrote: its own protobuf messages, in LevelDB's log format (32 KB blocks, 7 bytes of header)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(part)
            part = b""


def items(message: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message}


@needs_both
def test_wandb_has_one_run_with_every_figure_of_both_parts(tracked: SimpleNamespace) -> None:
    files = sorted((tracked.run / "wandb").glob("offline-run-*/*.wandb"))
    both = [list(records(path)) for path in files]
    assert len(both) == 2 and {path.stem for path in files} == {f"run-{tracked.first['wandb']['run_id']}"}
    rows = [items(r.history.item) for part in both for r in part if r.WhichOneof("record_type") == "history"]
    for name in ("loss", "val_loss", "comm_bytes"):
        assert [(row["step"], row[name]) for row in rows if name in row] == logged(tracked.lines, name), name
    counters = [row["_step"] for row in rows]
    assert counters == sorted(set(counters)) and [row["step"] for row in rows] == counters
    runs = [r.run for part in both for r in part if r.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].display_name, runs[-1].display_name) == ("hvdlm", "run", "renamed")
    config: dict[str, Any] = {}
    for part in both:
        for record in part:
            kind = record.WhichOneof("record_type")
            update = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
            config.update(items(update))
    assert config["model"]["width"] == 32 and config["run"]["world_size"] == 2 and config["train"]["steps"] == 10
    summary: dict[str, Any] = {}
    for record in both[1]:
        summary.update(items(record.summary.update))
    assert summary["state"] == "done" and summary["summary/parameters"] > 0


@needs_both
def test_servers_that_do_not_answer_cost_one_sentence_each_and_no_step(tmp_path: Path) -> None:
    places = ["--mlflow.tracking_uri", "http://127.0.0.1:9", "--mlflow.wait", "1", "--wandb.mode", "online"]
    done = train(tmp_path / "run", 6, *places, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **KEYLESS)
    said = [line for line in done.stderr.splitlines() if line.startswith("hvdlm: ")]
    assert len(said) == 2 and all("Training goes on" in line for line in said), done.stderr
    assert any("wandb login, or --wandb.mode offline" in line for line in said)
    assert any(line.startswith("hvdlm: mlflow: ") for line in said)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


class Recorder(tracker.Tracker):
    """A tracker without a library, whose server fails at first."""

    name, package = "recorder", "nothing"

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures, self.heard = failures, []

    def begin(self) -> None:
        """Fail so many times."""
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody\nthere")
        self.heard.append(("begin", self.earlier().get("id")))
        self.keep(id=len(self.heard))

    def log(self, step: int, figures: tracker.Figures) -> None:
        """Keep it."""
        self.heard.append((step, *figures))

    def end(self, summary: Any) -> None:
        """Keep it."""
        self.heard.append(("end", summary["stopped"]))


def tell(plugin: tracker.Tracker, config: Config, rank: int = 0) -> None:
    """Tell a tracker of a short run through pluggy, as a run does."""
    manager = plugins.load([])
    manager.register(plugin)
    info = {"parameters": 10, "start_step": 0}
    manager.hook.hvdlm_run_started(config=config, world=SimpleNamespace(rank=rank, size=2), info=info)
    for step in range(1, 5):
        result = StepResult(1.0, 10.0, 0.5, skipped=step == 3)
        manager.hook.hvdlm_step_ended(step=step, result=result, learning_rate=0.1, seconds=0.5)
    manager.hook.hvdlm_evaluated(step=4, metrics={"val_loss": 2.0})
    manager.hook.hvdlm_rolled_back(step=4, to_step=2, batches=[3, 4])
    manager.hook.hvdlm_run_ended(summary={"steps": 4, "stopped": "SIGTERM"})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(plugin_options={"recorder": SimpleNamespace(wait=10.0)})
    config.log.run, config.log.every = str(tmp_path), 2
    return config


def test_due_and_skipped_steps_evaluations_and_going_back_are_told_in_order(config: Config) -> None:
    plugin = Recorder()
    tell(plugin, config)
    assert [one[0] for one in plugin.heard] == ["begin", 1, 2, 3, 4, 4, 2, "end"]
    assert plugin.heard[3][-1] == "skipped" and "loss" in plugin.heard[1] and "compression" not in plugin.heard[1]
    assert plugin.heard[5:] == [(4, "val_loss"), (2, "rolled_back_from"), ("end", "SIGTERM")]


def test_only_a_resumed_run_takes_up_the_tracker_s_run(config: Config) -> None:
    tell(Recorder(), config)
    config.checkpoint.resume = "auto"
    again = Recorder()
    tell(again, config)
    config.checkpoint.resume = "none"
    afresh = Recorder()
    tell(afresh, config)
    assert again.heard[0] == ("begin", 1) and afresh.heard[0] == ("begin", None)


def test_other_ranks_tell_nothing(config: Config, tmp_path: Path) -> None:
    plugin = Recorder()
    tell(plugin, config, rank=1)
    assert plugin.heard == [] and list(tmp_path.iterdir()) == []


def test_a_server_that_comes_late_gets_what_follows(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = Recorder(failures=2)
    tell(plugin, config)
    assert [one[0] for one in plugin.heard] == ["begin", 2, 3, 4, 4, 2, "end"]
    sentence = "hvdlm: recorder: ConnectionError: nobody there. Training goes on, figures are missing there.\n"
    assert capsys.readouterr().err == sentence


def test_a_server_that_hangs_is_waited_for_as_long_as_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    from threading import Event

    sender, answered = Sender("mlflow"), Event()
    sender.send(lambda: answered.wait(60) and None)
    sender.close(0.05)
    assert "mlflow: what was logged last was not taken within 0.05 s and is lost" in capsys.readouterr().err
    answered.set()


@pytest.mark.parametrize("plugin, options", [(MLflow(), MLflowOptions()), (WeightsAndBiases(), WandbOptions())])
def test_a_tracker_that_is_not_installed_is_refused_in_a_sentence(
    plugin: tracker.Tracker, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm_trackers.tracker.importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=f"pip install {plugin.package}, or leave {plugin.name} out of --plugins"):
        plugin.hvdlm_check(config=Config(plugin_options={plugin.name: options}), spec=None)


def test_a_folder_called_like_a_tracker_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nosuchtracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tracker.installed("nosuchtracker") and tracker.installed("yaml")


@needs_both
@pytest.mark.parametrize(
    "options, expected",
    [
        (MLflowOptions(wait=-1), "mlflow.wait is below 0"),
        (MLflowOptions(tracking_uri="sqlite:///m.db"), "databases need the whole MLflow: pip install mlflow"),
    ],
)
def test_settings_that_do_not_do_are_refused(
    options: MLflowOptions, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm_trackers.mlflow.installed", lambda name: name != "sqlalchemy")
    with pytest.raises(HvdlmError, match=expected):
        MLflow().hvdlm_check(config=Config(plugin_options={"mlflow": options}), spec=None)


def test_naming_the_trackers_imports_neither_library() -> None:
    code = (
        "import sys; from hvdlm import plugins; plugins.load(['mlflow', 'wandb'])\n"
        "bad = {'mlflow', 'wandb', 'torch', 'tensorflow', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
