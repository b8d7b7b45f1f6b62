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

COUNTS = [
    ("torch", dict.fromkeys(chaos.KINDS, 1)),
    ("tensorflow", dict.fromkeys(chaos.KINDS, 0) | {"kills": 1}),
    pytest.param(
        "tensorflow",
        dict.fromkeys(chaos.KINDS, 1) | {"kills": 4},
        marks=pytest.mark.full(covered_by="the kills of TensorFlow; test_stops.py, test_published_state.py"),
    ),
]


@pytest.mark.parametrize("framework, counts", COUNTS, ids=["torch", "tensorflow", "tensorflow-all"])
def test_kills_stops_and_damage_lose_no_data(framework: str, counts: dict[str, int]) -> None:
    """Interruptions of every kind in torch, and kills in TensorFlow."""
    command = ["benchmarks/chaos.py", framework, "--short", *harness.flags(counts), "--steps", "48"]
    done = run_python(command, timeout=900, HVDLM_TEST_IMPORTS="")  # signalled launchers are processes of their own
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{counts['kills']} kills" in done.stdout and "nothing lost" in done.stdout
    [figure] = harness.figures(done.stdout)
    assert figure.reached and all(kind.replace("_", " ") in figure.title for kind, count in counts.items() if count), (
        figure
    )


@pytest.mark.parametrize("state, interrupted", [("done", False), ("running", True)])
def test_a_launcher_that_exits_with_0_may_be_interrupted(state: str, interrupted: bool, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 3, "code": 0}))
    attempt = SimpleNamespace(folder=tmp_path, errors=lambda: "")
    assert was_interrupted(attempt, 0) is interrupted
