"""Benchmarks run: each in a short form of seconds, whose figures are printed; how large they are is not judged here."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launching import ROOT, environment

SHORT = {
    "without_horovod.py": ["--layers", "1", "--width", "48", "--rows", "4", "--rounds", "2"],
    "all_reduce_cost.py": ["--calls", "2"],
}


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("script", SHORT)
def test_a_benchmark_prints_its_ratio(script: str, framework: str) -> None:
    command = [sys.executable, f"benchmarks/{script}", framework, *SHORT[script]]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    # 1: a ratio beyond its bar, which two rounds on a busy machine may give.
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert not done.stderr.count("Traceback"), done.stderr[-3000:]
    ratios = [float(ratio) for ratio in re.findall(r": ratio ([\d.]+) \(quartiles", done.stdout)]
    assert ratios and all(ratio > 0 for ratio in ratios), done.stdout
