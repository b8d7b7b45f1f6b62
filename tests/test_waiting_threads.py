"""A short form of benchmarks/waiting_threads.py: it runs, and prints a rate for every setting and load."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launching import ROOT, environment


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_every_setting_is_measured_idle_and_busy(framework: str) -> None:
    command = [sys.executable, "benchmarks/waiting_threads.py", "--framework", framework, "--width", "32"]
    command += ["--busy", "0", "1", "--seconds", "0.1", "--rounds", "2", "--quiet", "100", "--setting"]
    command += ["", "GOMP_SPINCOUNT=0"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    lines = re.findall(r"^  (default|GOMP_SPINCOUNT=0) +(\d+)  (\d\.\d+) \(", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in lines] == ["default", "GOMP_SPINCOUNT=0"] * 2, done.stdout
    assert all(int(rate) > 0 and float(ratio) > 0 for _, rate, ratio in lines)
    assert sum(float(ratio) == 1.0 for _, _, ratio in lines) >= 2  # the best setting of each load


def test_a_worker_that_cannot_start_ends_the_benchmark() -> None:
    command = [sys.executable, "benchmarks/waiting_threads.py", "--width", "30", "--setting", ""]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "--verbose shows its messages" in done.stderr, done.stdout + done.stderr
