"""The short form of every published result: the same examples and commands on the same data, a few steps of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launching import DATA, ROOT, environment, losses

PTB = ["ptb", "ptb_2_ranks"]
NAMES = ["shakespeare", "war_and_peace", "red_chamber", *PTB, "digits", "speech", "translation"]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data is not at {DATA} (set HVDLM_DATA)")


@needs_data
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_every_result_has_a_short_form_that_learns(framework: str, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/results.py", "--quick", "--data", str(DATA), "--folder", str(tmp_path)]
    command += ["--frameworks", framework]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["result"] for row in rows] == NAMES and all(row["reached"] for row in rows)
    assert "NOT REACHED" not in done.stdout
    one, two = (losses(tmp_path / f"{name}-{framework}") for name in PTB)
    assert len(one) > 1 and one == two  # to the last bit: a rank takes half a batch at a time, as each of two does


def test_a_comparison_without_the_other_run_ends_before_it_trains(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/results.py", "ptb_2_ranks", "--frameworks", "torch"]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "measure ptb-torch first" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
