"""A few of the blows of ``make chaos``: ranks killed at random moments, runs asked to stop at random moments."""

from __future__ import annotations

import subprocess
import sys

from launching import ROOT, environment


def test_ten_kills_and_two_stops_lose_nothing() -> None:
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "10", "--stops", "2", "--steps", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "10 kills and 2 stops: nothing lost" in done.stdout
