"""``python -m hvdlm bench``, and the two hosts on a slow wire that benchmarks run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdlm.communication import collective_benchmark
from hvdlm.errors import HvdlmError
from launching import ROOT, launch

sys.path.insert(0, str(ROOT / "benchmarks"))
import two_hosts

FRAMEWORKS = ["torch", "tensorflow"]


def test_sizes_are_each_four_times_the_one_before() -> None:
    assert collective_benchmark.sizes(1024, 65536) == [1024, 4096, 16384, 65536]
    assert collective_benchmark.sizes(1024, 20000) == [1024, 4096, 16384]
    for wrong in ((0, 4096), (4096, 1024)):
        with pytest.raises(HvdlmError, match="expected 1024 <= smallest <= largest"):
            collective_benchmark.sizes(*wrong)


def test_the_fit_finds_latency_and_inverse_bandwidth() -> None:
    points = [(size, 2e-5 + size * 1e-9) for size in collective_benchmark.sizes(1024, 1 << 28)]
    found = collective_benchmark.fit(points)
    assert found.alpha == pytest.approx(2e-5, rel=1e-6) and found.beta == pytest.approx(1e-9, rel=1e-6)
    flat, steep = (
        collective_benchmark.fit([(1024, 1e-3), (4096, 9e-4)]),
        collective_benchmark.fit([(1024, 1e-6), (4096, 5e-6)]),
    )
    assert flat.beta == 0.0 and flat.alpha > 0.0
    assert steep.alpha == 0.0 and steep.beta > 0.0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bench_measures_every_collective_beside_raw_mpi(framework: str, tmp_path: Path) -> None:
    output = tmp_path / "found" / "bench.json"
    command = ["-m", "hvdlm", "bench", "--framework", framework, "--largest", "65536", "--output", str(output)]
    done = launch("mpirun", 2, command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert (found["framework"], found["ranks"]) == (framework, 2)
    assert list(found["collectives"]) == list(collective_benchmark.COLLECTIVES)
    for entry in found["collectives"].values():
        assert [size["bytes"] for size in entry["sizes"]] == [1024, 4096, 16384, 65536]
        assert all(size["seconds"] > 0 and size["raw_seconds"] > 0 for size in entry["sizes"])
        assert entry["fit"]["alpha"] >= 0 and entry["fit"]["beta"] >= 0
    assert "<svg" in output.with_suffix(".svg").read_text()


def test_bench_alone_is_refused() -> None:
    done = launch("", 1, ["-m", "hvdlm", "bench", "--largest", "1024"])
    assert done.returncode == 2 and "bench measures what ranks send to each other: start 2 or more" in done.stderr


def test_two_hosts_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(two_hosts.Missing, match="run this as root on Linux"):
        two_hosts.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(two_hosts.shutil, "which", lambda program, path: None if program == "sshd" else "/bin/true")
    with pytest.raises(two_hosts.Missing, match="install openssh-server"):
        two_hosts.check()


def test_two_hosts_train_and_leave_nothing_behind(tmp_path: Path) -> None:
    """The bytes that interfaces count are those that hvdlm counts."""
    options = ["--model.width", "128", "--model.layers", "2", "--train.steps", "8", "--train.threads", "1"]
    options += [
        "--train.eval_every",
        "0",
        "--train.batch_size",
        "2",
        "--data.context",
        "16",
        "--log.run",
        str(tmp_path),
    ]
    try:
        with two_hosts.two_hosts() as hosts:
            hosts.shape(1e9)
            before = sum(hosts.sent())
            done = hosts.run(["-m", "hvdlm", *options, "--log.overwrite", "true"], timeout=120)
            wire = sum(hosts.sent()) - before
    except two_hosts.Missing as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads((tmp_path / "summary.json").read_text())["bytes_communicated"]
    assert counted > 20e6 and wire == pytest.approx(counted, rel=0.10)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"hvdlm-{os.getpid()}" not in left
