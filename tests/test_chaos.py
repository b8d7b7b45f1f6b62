"""The short form of ``make chaos``: runs that are interrupted in every way, at random moments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launching import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
import chaos
import harness
from launcher_signals import was_interrupted


def test_ten_kills_and_two_stops_lose_no_data() -> None:
    """Interruptions of every kind in torch, and of four kinds in TensorFlow."""
    counts = ["--kills", "10", "--stops", "2", "--nans", "2", "--two_runs", "2"]
    command = ["benchmarks/chaos.py", "--short", *counts, "--steps", "90"]
    done = run_python(command, timeout=900, HVDLM_TEST_IMPORTS="")  # signalled launchers are processes of their own
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "10 kills, 2 stops" in done.stdout and "nothing lost" in done.stdout
    figures = harness.figures(done.stdout)  # of each framework
    assert [figure.reached for figure in figures] == [True, True]
    assert all(kind.replace("_", " ") in figures[0].title for kind in chaos.KINDS), figures[0]


@pytest.mark.parametrize("state, interrupted", [("done", False), ("running", True)])
def test_a_launcher_that_exits_with_0_may_be_interrupted(state: str, interrupted: bool, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 3, "code": 0}))
    attempt = SimpleNamespace(folder=tmp_path, errors=lambda: "")
    assert was_interrupted(attempt, 0) is interrupted
