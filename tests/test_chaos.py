"""A short form of ``make chaos``: runs that are killed or asked to stop at random moments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launching import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
from launcher_signals import was_interrupted


def test_ten_kills_and_two_stops_lose_no_data() -> None:
    """One interruption of every other kind, too, in one of the frameworks."""
    command = ["benchmarks/chaos.py", "--short", "--kills", "10", "--stops", "2", "--steps", "90"]
    done = run_python(command, timeout=900, HVDLM_TEST_IMPORTS="")  # signalled launchers are processes of their own
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "10 kills, 2 stops" in done.stdout and "nothing lost" in done.stdout


@pytest.mark.parametrize("state, interrupted", [("done", False), ("running", True)])
def test_a_launcher_that_exits_with_0_may_be_interrupted(state: str, interrupted: bool, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 3, "code": 0}))
    attempt = SimpleNamespace(folder=tmp_path, errors=lambda: "")
    assert was_interrupted(attempt, 0) is interrupted
