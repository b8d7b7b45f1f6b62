"""Traces of steps: ``log.profile`` writes, on every rank, what the framework has computed in them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import both_frameworks
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.training import run_folder
from hvdlm_telemetry.profile import Profile
from launching import SMALL, launch

OPTIONS = ["-m", "hvdlm", *SMALL, "--train.steps", "6", "--train.eval_every", "0", "--train.threads", "1"]


def ranges(path: Path) -> Counter[str]:
    """Return how often a trace has each named range."""
    events = json.loads(path.read_text())["traceEvents"]
    names = Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["dur"] >= 0)
    return Counter({name: names[name] for name in ("forward", "backward", "exchange", "update")})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@both_frameworks
def test_a_trace_names_the_parts_of_every_step(framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch("", 1, [*OPTIONS, "--framework", framework, "--log.run", str(run), "--log.profile", "3:4"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert names_in(run / "profile") == ["steps-3-4-rank-0.json"]
    counts = ranges(run / "profile" / "steps-3-4-rank-0.json")
    assert len(counts) == 4 and min(counts.values()) >= 2, counts


@both_frameworks
def test_every_stage_of_a_pipeline_writes_its_trace(framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--framework", framework, "--parallel.pipeline", "2", "--train.micro_batch_size", "4"]
    done = launch("mpirun", 2, [*OPTIONS, *options, "--log.run", str(run), "--log.profile", "6:6"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert names_in(run / "profile") == ["steps-6-6-rank-0.json", "steps-6-6-rank-1.json"]
    for rank in (0, 1):
        counts = ranges(run / "profile" / f"steps-6-6-rank-{rank}.json")
        assert counts["forward"] >= 2 and counts["backward"] >= 2 and counts["update"] >= 1, counts


class FakeTrainable:
    """Records which traces are recorded."""

    def __init__(self) -> None:
        self.recording = 0

    def start_trace(self) -> Any:
        self.recording += 1
        assert self.recording == 1, "the framework records one trace at a time"
        return self

    def stop(self) -> str:
        self.recording -= 1
        return "{}"


class Events:
    """The events of a run with ``log.profile``, as the loop calls them."""

    def __init__(self, folder: Path, steps: str, start_step: int = 0) -> None:
        self.config = Config()
        self.config.log.run, self.config.log.profile = str(folder), steps
        self.config.train.steps = 20
        self.trainable, self.closers = FakeTrainable(), []
        closing = SimpleNamespace(callback=self.closers.append)
        opened = SimpleNamespace(trainable=self.trainable, closing=closing)
        run: Any = SimpleNamespace(opened=opened, in_time=set())
        self.profile = Profile()
        world: Any = SimpleNamespace(rank=0)
        self.profile.hvdlm_run_started(self.config, world, {"start_step": start_step}, run)

    def steps(self, first: int, last: int) -> list[int]:
        """Do steps; return those that were recorded."""
        recorded = []
        for step in range(first, last + 1):
            recorded += [step] if self.trainable.recording else []
            self.profile.hvdlm_step_ended(step)
        return recorded


def test_a_range_may_begin_before_a_resumed_run(tmp_path: Path) -> None:
    events = Events(tmp_path, "3:7", start_step=4)
    assert events.steps(5, 10) == [5, 6, 7]
    events = Events(tmp_path, "3:7", start_step=7)
    assert events.steps(8, 10) == []
    assert names_in(tmp_path / "profile") == ["steps-5-7-rank-0.json"]


def test_a_trace_ends_with_a_rollback_and_begins_anew(tmp_path: Path) -> None:
    events = Events(tmp_path, "3:7")
    assert events.steps(1, 5) == [3, 4, 5]
    events.profile.hvdlm_rolled_back(step=5, to_step=1)
    assert names_in(tmp_path / "profile") == ["steps-3-5-rank-0.json"] and not events.trainable.recording
    assert events.steps(2, 9) == [3, 4, 5, 6, 7]
    assert names_in(tmp_path / "profile") == ["steps-3-5-rank-0.json", "steps-3-7-rank-0.json"]


def test_a_run_that_ends_within_the_range_writes_its_trace(tmp_path: Path) -> None:
    events = Events(tmp_path, "3:7")
    events.steps(1, 4)
    events.profile.hvdlm_run_ended({"steps": 4})
    assert names_in(tmp_path / "profile") == ["steps-3-4-rank-0.json"]


def test_a_run_that_fails_leaves_no_recording_behind(tmp_path: Path) -> None:
    events = Events(tmp_path, "3:7")
    events.steps(1, 4)
    for close in events.closers:
        close()
    assert not events.trainable.recording and not (tmp_path / "profile").exists()


def test_a_framework_without_traces_is_refused(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(opened=SimpleNamespace(trainable=object()))
    config = Config(framework="tables")
    config.log.profile = "3:7"
    with pytest.raises(HvdlmError, match="framework tables records no traces: leave --log"):
        Profile().hvdlm_run_started(config, SimpleNamespace(rank=0), {"start_step": 0}, run)  # type: ignore[arg-type]


def test_traces_are_files_of_the_run_that_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    for name in ("steps-3-4-rank-0.json", ".steps-3-4-rank-12.json.0123abcd.partial"):
        (folder / name).touch()
    run_folder.clear(tmp_path)
    assert not folder.exists()
    folder.mkdir()
    (folder / "steps-3-4-rank-0.json").touch()
    (folder / "my-notes.json").touch()
    run_folder.clear(tmp_path)
    assert names_in(folder) == ["my-notes.json"]
