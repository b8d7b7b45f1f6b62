"""``python -m hvdlm bench``, and the network namespaces with slow links that benchmarks run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdlm.errors import HvdlmError
from hvdlm_backends import bench_command, collective_benchmark
from launching import ROOT, launch, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
import hosts

FRAMEWORKS = ["torch", "tensorflow"]


def test_sizes_are_each_four_times_the_one_before() -> None:
    assert collective_benchmark.sizes(1024, 65536) == [1024, 4096, 16384, 65536]
    assert collective_benchmark.sizes(1024, 20000) == [1024, 4096, 16384]
    for wrong in ((0, 4096), (4096, 1024)):
        with pytest.raises(HvdlmError, match="expected 1024 <= smallest <= largest"):
            collective_benchmark.sizes(*wrong)


def test_the_fit_finds_latency_and_inverse_bandwidth() -> None:
    points = [(size, 2e-5 + size * 1e-9) for size in collective_benchmark.sizes(1024, 1 << 28)]
    fitted = collective_benchmark.fit(points)
    assert fitted.alpha == pytest.approx(2e-5, rel=1e-6) and fitted.beta == pytest.approx(1e-9, rel=1e-6)
    flat, steep = (
        collective_benchmark.fit([(1024, 1e-3), (4096, 9e-4)]),
        collective_benchmark.fit([(1024, 1e-6), (4096, 5e-6)]),
    )
    assert flat.beta == 0.0 and flat.alpha > 0.0
    assert steep.alpha == 0.0 and steep.beta > 0.0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bench_measures_every_collective_beside_raw_mpi(framework: str, tmp_path: Path) -> None:
    output = tmp_path / "figures" / "bench.json"
    command = ["-m", "hvdlm", "bench", "--framework", framework, "--largest", "4096", "--output", str(output)]
    command += ["--seconds", "0.05"]
    done = launch("mpirun", 2, command)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert (figures["framework"], figures["ranks"]) == (framework, 2)
    assert list(figures["collectives"]) == list(collective_benchmark.COLLECTIVES)
    for entry in figures["collectives"].values():
        assert [size["bytes"] for size in entry["sizes"]] == [1024, 4096]
        assert all(size["seconds"] > 0 and size["raw_seconds"] > 0 for size in entry["sizes"])
        assert entry["fit"]["alpha"] >= 0 and entry["fit"]["beta"] >= 0
    assert "<svg" in output.with_suffix(".svg").read_text()


def test_bench_with_one_rank_is_refused() -> None:
    done = run_python(["-m", "hvdlm", "bench", "--largest", "1024"])
    assert done.returncode == 2 and "bench measures communication between ranks: start at least 2" in done.stderr


def test_bench_without_time_is_refused() -> None:
    with pytest.raises(HvdlmError, match="--seconds 0: expected a number above 0"):
        bench_command.main(["--seconds", "0"])


def test_two_hosts_report_missing_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(hosts.Missing, match="run this as root on Linux"):
        hosts.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda program, path: None if program == "tc" else "/bin/true")
    with pytest.raises(hosts.Missing, match="install iproute2"):
        hosts.check()


def test_two_hosts_train_and_clean_up(tmp_path: Path) -> None:
    """The network interfaces count as many bytes as hvdlm does, where exponents are not coded."""
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
        with hosts.open_hosts() as opened:
            opened.shape(1e9)
            before = sum(opened.sent())
            command = ["-m", "hvdlm", *options, "--log.overwrite", "true"]
            done = opened.run(command, timeout=120, variables={"HOROVOD_RING_CODING": "0"})
            wire = sum(opened.sent()) - before
    except hosts.Missing as reason:
        pytest.skip(str(reason))
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads((tmp_path / "summary.json").read_text())["bytes_communicated"]
    assert counted > 20e6 and wire == pytest.approx(counted, rel=0.10)
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"hvdlm-{os.getpid()}" not in namespaces
