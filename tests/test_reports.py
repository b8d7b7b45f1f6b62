"""Steps are reported when their figures are known, without a change of what the run decides or logs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.config import Config
from hvdlm.protocols.types import StepResult
from hvdlm.training.reports import Reports
from hvdlm.training.run_control import RunControl
from launching import metrics, read_rows, run_with_faults


class Pending(StepResult):
    """A result that a device has yet to compute."""

    pending = True  # type: ignore[assignment]


class Events:
    """What is reported and voted on by ``Reports`` of a run that isn't there, in order."""

    def __init__(self, **train: Any) -> None:
        self.log: list[str] = []
        config = Config()
        config.train.steps = 6
        for name, value in train.items():
            setattr(config.train, name, value)
        hook = SimpleNamespace(hvdlm_step_ended=lambda **report: self.log.append(f"report {report['step']}"))
        run: Any = SimpleNamespace(
            config=config,
            world=SimpleNamespace(transfer_seconds=lambda: None),
            guard=SimpleNamespace(add=lambda result: None),
            saver=SimpleNamespace(ready=lambda: False),
            manager=SimpleNamespace(hook=hook),
            trainable=None,
        )
        totals: Any = SimpleNamespace(add=lambda result, seconds: None, rates=None)
        consensus: Any = SimpleNamespace(vote=lambda row, ready, skipped: self.log.append(f"vote {row // 8}"))
        self.control = RunControl(run)
        self.reports = Reports(run, totals, consensus, self.control)

    def step(self, number: int, kind: type[StepResult]) -> None:
        """Do a step as the loop does it, where nothing is due after it."""
        self.reports.begin()
        self.log.append(f"step {number}")
        self.reports.add(number, 8 * number, 0.1, kind(1.0, 1.0, 1.0))
        self.reports.vote()


IN_TIME = [f"{what} {number}" for number in (1, 2, 3) for what in ("step", "report", "vote")]
LATE = ["step 1", "step 2", "report 1", "vote 1", "step 3", "report 2", "vote 2"]


@pytest.mark.parametrize("kind, expected", [(StepResult, IN_TIME), (Pending, LATE)], ids=["finished", "pending"])
def test_a_pending_step_is_reported_after_the_next_began(kind: type[StepResult], expected: list[str]) -> None:
    events = Events()
    for number in (1, 2, 3):
        events.step(number, kind)
    assert events.log == expected


IN_ORDER = {
    "spike": IN_TIME,
    "plugin": ["step 1", "report 1", "vote 1", "step 2", "step 3", "report 2", "vote 2", "report 3", "vote 3"],
    "last": [*LATE, "report 3", "vote 3"],
}


@pytest.mark.parametrize("case", IN_ORDER)
def test_what_needs_the_figures_has_them_at_once(case: str) -> None:
    """The limit of spikes, a plugin that asked for it after steps 1 and 3, and the end of the run."""
    events = Events(**{"spike": {"spike": 4.0}, "plugin": {}, "last": {"steps": 3}}[case])
    if case == "plugin":
        events.control.in_time |= {1, 3}
    for number in (1, 2, 3):
        events.step(number, Pending)
    assert events.log == IN_ORDER[case]


TIMES = ("seconds", "share", "per_second", "overlap", "mfu", "memory")


def decisions(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what was timed."""
    return [{key: v for key, v in line.items() if not any(time in key for time in TIMES)} for line in metrics(run)]


@pytest.mark.parametrize("options", [[], ["--train.spike", "1.2"]], ids=["default", "spike"])
def test_late_figures_change_no_decision(options: list[str], tmp_path: Path) -> None:
    """Of a run that skips steps, rolls back, evaluates, saves, compares replicas, and is stopped by a signal."""
    runs = []
    for pending in (False, True):
        run = tmp_path / f"pending-{pending}"
        faults: dict[str, Any] = {"nan": [4, 12, 13, 14], "rows": str(run) + "-rows", "signals": [[1, 27, "SIGTERM"]]}
        every = ["--checkpoint.every", "10", "--train.eval_every", "9", "--train.replica_check_every", "4"]
        done = run_with_faults(run, "torch", 2, *every, *options, **faults, pending=pending)
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
        facts = {name: summary.get(name) for name in ("steps", "stopped", "skipped_steps", "train_loss")}
        runs.append((done.returncode, decisions(run), read_rows(Path(faults["rows"]), 2), saved, facts))
    assert runs[0] == runs[1]
    assert any("rolled_back_from" in line for line in runs[0][1])
