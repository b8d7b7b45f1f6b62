"""MLflow and Weights & Biases store a run's metrics, which their readers return; servers that fail end no run."""

from __future__ import annotations

import json
import struct
import subprocess
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
from hvdlm.telemetry.rates import Rates
from hvdlm_trackers import tracker
from hvdlm_trackers.mlflow import MLflow, MLflowOptions
from hvdlm_trackers.sender import Sender
from hvdlm_trackers.wandb import WandbOptions, WeightsAndBiases
from launching import SMALL, launch, run_python

BOTH = all(tracker.installed(name) for name in ("mlflow", "wandb"))
needs_both = pytest.mark.skipif(not BOTH, reason="needs the extras mlflow and wandb: pip install hvdlm[mlflow,wandb]")
SHORT = [*SMALL, "--log.every", "2", "--train.warmup", "2", "--train.eval_every", "5", "--log.tensorboard", "false"]
KEYLESS = {"WANDB_API_KEY": "", "NETRC": "/dev/null"}


def train(run: Path, steps: int, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks with both trackers."""
    command = ["-m", "hvdlm", "--plugins", "[mlflow,wandb]", "--log.run", str(run), *SHORT]
    command += ["--train.steps", str(steps), *options]
    done = launch("mpirun", 2, command, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return a run of 6 steps that was resumed to step 10, and where both trackers store it."""
    folder = tmp_path_factory.mktemp("tracked")
    options = ["--mlflow.tracking_uri", str(folder / "ml"), "--mlflow.experiment", "small", "--wandb.mode", "offline"]
    run = folder / "run"
    train(run, 6, *options)
    first = {name: json.loads((run / f"{name}.json").read_text()) for name in ("mlflow", "wandb")}
    train(run, 10, *options, "--checkpoint.resume", "auto", "--wandb.name", "renamed")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(run=run, store=folder / "ml", first=first, lines=lines)


def logged(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


@needs_both
def test_mlflow_has_one_run_with_all_figures_after_resuming(
    tracked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=str(tracked.store))
    experiment = client.get_experiment_by_name("small")
    (logged_run,) = client.search_runs([experiment.experiment_id])
    assert logged_run.info.run_id == tracked.first["mlflow"]["run_id"]
    assert logged_run.info.status == "FINISHED" and logged_run.info.run_name == "run"
    assert logged_run.data.params["model.width"] == "32" and logged_run.data.tags["hvdlm.world_size"] == "2"
    assert logged_run.data.tags["hvdlm.state"] == "done" and "hvdlm.versions.torch" in logged_run.data.tags
    for name in ("loss", "val_loss", "comm_bytes"):
        history = client.get_metric_history(logged_run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == logged(tracked.lines, name), name
    assert len(logged(tracked.lines, "loss")) == 6  # steps 1, 2, 4, 6, 8, 10: as log.every says
    files = Path(logged_run.info.artifact_uri.removeprefix("file://"))
    summary = json.loads((files / "summary.json").read_text())
    assert summary == json.loads((tracked.run / "summary.json").read_text())
    assert logged_run.data.metrics["summary/tokens_per_second"] == summary["tokens_per_second"]
    assert yaml.safe_load((files / "config.yaml").read_text())["train"]["steps"] == 10


def records(path: Path) -> Iterator[Any]:
    """Yield wandb's records: protobuf messages in LevelDB's log format (32 KB blocks, 7 bytes of header)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or its last fragment
            yield Record.FromString(record)
            record = b""


def items(message: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message}


@needs_both
def test_wandb_has_one_run_with_all_figures_after_resuming(tracked: SimpleNamespace) -> None:
    files = sorted((tracked.run / "wandb").glob("offline-run-*/*.wandb"))
    segments = [list(records(path)) for path in files]
    assert len(segments) == 2 and {path.stem for path in files} == {f"run-{tracked.first['wandb']['run_id']}"}
    rows = [items(r.history.item) for segment in segments for r in segment if r.WhichOneof("record_type") == "history"]
    for name in ("loss", "val_loss", "comm_bytes"):
        assert [(row["step"], row[name]) for row in rows if name in row] == logged(tracked.lines, name), name
    counters = [row["_step"] for row in rows]
    assert counters == sorted(set(counters)) and [row["step"] for row in rows] == counters
    runs = [r.run for segment in segments for r in segment if r.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].display_name, runs[-1].display_name) == ("hvdlm", "run", "renamed")
    config: dict[str, Any] = {}
    for segment in segments:
        for record in segment:
            kind = record.WhichOneof("record_type")
            update = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
            config.update(items(update))
    assert config["model"]["width"] == 32 and config["run"]["world_size"] == 2 and config["train"]["steps"] == 10
    summary: dict[str, Any] = {}
    for record in segments[1]:
        summary.update(items(record.summary.update))
    assert summary["state"] == "done" and summary["summary/parameters"] > 0


@needs_both
def test_unreachable_servers_cost_one_sentence_and_no_step(tmp_path: Path) -> None:
    options = ["--mlflow.tracking_uri", "http://127.0.0.1:9", "--mlflow.wait", "1", "--wandb.mode", "online"]
    done = train(tmp_path / "run", 6, *options, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **KEYLESS)
    messages = [line for line in done.stderr.splitlines() if line.startswith("hvdlm: ")]
    assert len(messages) == 2 and all("Training continues" in line for line in messages), done.stderr
    assert any("wandb login, or --wandb.mode offline" in line for line in messages)
    assert any(line.startswith("hvdlm: mlflow: ") for line in messages)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


class Recorder(tracker.Tracker):
    """A tracker without a library, whose server fails at first."""

    name, package = "recorder", "nothing"

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures, self.events = failures, []

    def begin(self) -> None:
        """Fail ``failures`` times, then record the begin."""
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody\nthere")
        self.events.append(("begin", self.earlier().get("id")))
        self.keep(id=len(self.events))

    def log(self, step: int, metrics: tracker.Metrics) -> None:
        """Record the event."""
        self.events.append((step, *metrics))

    def end(self, summary: Any) -> None:
        """Record the event."""
        self.events.append(("end", summary["stopped"]))


def send_events(plugin: tracker.Tracker, config: Config, rank: int = 0) -> None:
    """Send the events of a short run to a tracker through pluggy, as a run does."""
    manager = plugins.load([])
    manager.register(plugin)
    info = {"parameters": 10, "start_step": 0}
    manager.hook.hvdlm_run_started(config=config, world=SimpleNamespace(rank=rank, size=2), info=info, run=None)
    rates = Rates(40)
    for step in range(1, 5):
        result = StepResult(1.0, 10.0, 0.5, skipped=step == 3)
        rates = rates.after(result, 0.5)
        manager.hook.hvdlm_step_ended(step=step, result=result, learning_rate=0.1, seconds=0.5, rates=rates)
    manager.hook.hvdlm_evaluated(step=4, metrics={"val_loss": 2.0})
    manager.hook.hvdlm_rolled_back(step=4, to_step=2, batches=[3, 4])
    manager.hook.hvdlm_run_ended(summary={"steps": 4, "stopped": "SIGTERM"})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(plugin_options={"recorder": SimpleNamespace(wait=10.0)})
    config.log.run, config.log.every = str(tmp_path), 2
    return config


def test_events_reach_the_tracker_in_order(config: Config) -> None:
    plugin = Recorder()
    send_events(plugin, config)
    assert [one[0] for one in plugin.events] == ["begin", 1, 2, 3, 4, 4, 2, "end"]
    assert plugin.events[3][-1] == "skipped" and "loss" in plugin.events[1] and "compression" not in plugin.events[1]
    assert plugin.events[5:] == [(4, "val_loss"), (2, "rolled_back_from"), ("end", "SIGTERM")]


def test_only_a_resumed_run_continues_the_trackers_run(config: Config) -> None:
    send_events(Recorder(), config)
    config.checkpoint.resume = "auto"
    resumed = Recorder()
    send_events(resumed, config)
    config.checkpoint.resume = "none"
    restarted = Recorder()
    send_events(restarted, config)
    assert resumed.events[0] == ("begin", 1) and restarted.events[0] == ("begin", None)


def test_other_ranks_log_nothing(config: Config, tmp_path: Path) -> None:
    plugin = Recorder()
    send_events(plugin, config, rank=1)
    assert plugin.events == [] and list(tmp_path.iterdir()) == []


def test_a_late_server_gets_the_remaining_figures(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = Recorder(failures=2)
    send_events(plugin, config)
    assert [one[0] for one in plugin.events] == ["begin", 2, 3, 4, 4, 2, "end"]
    sentence = "hvdlm: recorder: ConnectionError: nobody there. Training continues, metrics are missing there.\n"
    assert capsys.readouterr().err == sentence


def test_the_wait_for_a_hanging_server_is_limited(capsys: pytest.CaptureFixture[str]) -> None:
    from threading import Event

    sender, answered = Sender("mlflow"), Event()
    sender.send(lambda: answered.wait(60) and None)
    sender.close(0.05)
    assert "mlflow: the last metrics were not accepted within 0.05 s and are lost" in capsys.readouterr().err
    answered.set()


@pytest.mark.parametrize("plugin, options", [(MLflow(), MLflowOptions()), (WeightsAndBiases(), WandbOptions())])
def test_a_missing_tracker_is_refused_in_one_sentence(
    plugin: tracker.Tracker, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm_trackers.tracker.importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=f"pip install {plugin.package}, or remove {plugin.name} from --plugins"):
        plugin.hvdlm_check(config=Config(plugin_options={plugin.name: options}), spec=None)


def test_a_folder_named_like_a_tracker_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nosuchtracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tracker.installed("nosuchtracker") and tracker.installed("yaml")


@needs_both
@pytest.mark.parametrize(
    "options, expected",
    [
        (MLflowOptions(wait=-1), "mlflow.wait is below 0"),
        (MLflowOptions(tracking_uri="sqlite:///m.db"), "databases need the complete MLflow: pip install mlflow"),
    ],
)
def test_invalid_settings_are_refused(options: MLflowOptions, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm_trackers.mlflow.installed", lambda name: name != "sqlalchemy")
    with pytest.raises(HvdlmError, match=expected):
        MLflow().hvdlm_check(config=Config(plugin_options={"mlflow": options}), spec=None)


def test_naming_the_trackers_imports_neither_library() -> None:
    code = (
        "import sys; from hvdlm import plugins; plugins.load(['mlflow', 'wandb'])\n"
        "bad = {'mlflow', 'wandb', 'torch', 'tensorflow', 'keras'} & set(sys.modules); assert not bad, bad"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr
