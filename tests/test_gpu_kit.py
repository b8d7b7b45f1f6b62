"""The GPU kit (benchmarks/gpu.py): order, deadlines, results that survive a killed call, tables; on CPUs end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import single_rank_trainable, small_config
from hvdlm.protocols.types import Batch
from hvdlm_language.presets import PRESETS
from launching import ROOT, environment, processes_of, wait_until

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_build
import gpu_cases
import gpu_launch
import gpu_results
from gpu_cases import Case, Launch
from gpu_results import Results

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CASES = (Case("a: one", {}), Case("a: two", {}), Case("a: three", {}))


def worker(folder: Path, code: str) -> str:
    """Write a worker script; return its path, which ``gpu_launch.start`` takes in place of a name."""
    path = folder / "worker.py"
    head = f"import json, os, sys, time\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nfrom harness import emit\n"
    path.write_text(head + "names = json.loads(sys.argv[sys.argv.index('--cases') + 1])\n" + code)
    return str(path)


def kit(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> gpu.Kit:
    """Return a kit whose launches run ``script``."""
    start = gpu_launch.start
    monkeypatch.setattr(gpu_launch, "start", lambda name, *rest: start(script, *rest))
    return gpu.Kit(Results(folder / "results"), True, time.monotonic() + seconds, folder)


def launch(*cases: Case, deadline: float = 20) -> Launch:
    return Launch("a", "ranks", 1, "local", cases, deadline=deadline)


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results" / "results.json").read_text())["cases"]


def test_the_speed_bars_and_nccl_come_first() -> None:
    names = [launch.name for launch in gpu_cases.plan("all", gpu_cases.BACKENDS)]
    assert names[:2] == ["speed: batch 12, compiled", "speed: batch 48, compiled"]
    checks = ["one rank", "2 CPU ranks", "offload", "nccl", "nccl, killed", "mpi4py", "mpi4py, killed"]
    checks += ["mpi", "mpi, killed", "nccl, compiled"]
    assert names[4:14] == checks
    cases = [case.name for launch in gpu_cases.plan("all", gpu_cases.BACKENDS) for case in launch.cases]
    assert len(cases) == len(set(cases)) == 57
    assert gpu.backends(0) == ["mpi4py", "mpi"] and gpu.backends(1)[0] == "nccl"


def test_every_case_is_written_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
path = {str(tmp_path / "results" / "results.json")!r}
for number, name in enumerate(names):
    deadline = time.monotonic() + 10
    while number and (not os.path.exists(path) or names[number - 1] not in open(path).read()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    emit("end", {{"name": name, "losses": [1.0]}})
"""
    assert kit(tmp_path, worker(tmp_path, code), monkeypatch).run([launch(*CASES)])
    assert [case["attempts"] for case in stored(tmp_path).values()] == [1, 1, 1]


def test_a_case_beyond_its_deadline_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three hangs: its launch is ended, the third is run, then the second is tried once more."""
    code = """
for name in names:
    if name == "a: two":
        time.sleep(600)
    emit("end", {"name": name, "losses": [1.0]})
"""
    assert kit(tmp_path, worker(tmp_path, code), monkeypatch).run([launch(*CASES, deadline=2)])
    values = stored(tmp_path)
    assert list(values) == ["a: one", "a: two", "a: three"]
    assert values["a: two"] == {"error": "no result within 2 s", "attempts": 2}
    assert "error" not in values["a: three"] and not processes_of(tmp_path / "worker.py")


def test_the_limit_ends_a_launch_but_fails_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'emit("end", {"name": names[0], "losses": [1.0]})\ntime.sleep(600)\n'
    began = time.monotonic()
    assert not kit(tmp_path, worker(tmp_path, code), monkeypatch, gpu.RESERVE + 3).run([launch(*CASES)])
    assert list(stored(tmp_path)) == ["a: one"] and time.monotonic() - began < 30
    assert not processes_of(tmp_path / "worker.py")
    results = Results(tmp_path / "results")
    assert results.pending([launch(*CASES)]) == [(launch(*CASES), CASES[1:])]


def test_a_launch_that_always_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'raise ValueError("no such device")'
    cases = tuple(Case(f"a: {number}", {}) for number in range(6))
    assert kit(tmp_path, worker(tmp_path, code), monkeypatch).run([launch(*cases)])
    errors = [case["error"] for case in stored(tmp_path).values()]
    assert errors == ["ValueError: no such device"] * 2 + [gpu.UNTRIED] * 4


def test_the_tables_judge_what_was_measured(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.machine = {"device": "Card", "versions": "PyTorch 2", "date": "2026-01-02", "build_seconds": 120.0}
    speed = {"hvdlm_speed": 460000.0, "plain_speed": 400000.0, "ratio": 1.15, "quartiles": [1.1, 1.2], "mfu": 0.4}
    speed |= {"hvdlm_memory": 3e10, "plain_memory": 4e10, "plain": "compiled"}
    results.add("speed: batch 48, compiled", **speed)
    results.add("speed: batch 48, default", **speed | {"ratio": 1.0, "hvdlm_speed": 450000.0})
    results.add("one rank: fp32", losses=[2.0] * gpu_cases.STEPS)
    results.add("nccl: data 2, fp32", losses=[2.00005] * gpu_cases.STEPS)
    results.add("nccl: tensor 2, fp32", losses=[*[2.0] * 49, 2.01, *[9.0] * 10])  # step 50 counts, later ones do not
    results.add("nccl: int8", losses=[2.0])
    results.add("nccl: ZeRO 1, fp32", error="why")
    launches = gpu_cases.plan("all", ["nccl"])
    text = gpu_results.tables(results, launches)
    assert text.startswith("Card, PyTorch 2, 2026-01-02. Horovod with NCCL was built in 120 s.\n")
    assert "| 48, compiled | 460,000 | 400,000 | 1.150 (1.100 to 1.200) | >= 1.1 | 40.0% | 30.00 | 40.00 |" in text
    assert "Batch 48: default options / best: 0.870 (bar >= 0.95 (missed))." in text
    assert "memory of hvdlm / of the plain loop: 0.750 (bar <= 1)." in text
    assert "| data 2, fp32 | <= 0.0001 | 5.0e-05 |" in text
    assert "| tensor 2, fp32 | <= 0.0001 | 1.0e-02 (missed) |" in text
    assert "| int8 | <= 0.001 | no reference |" in text and "- nccl: ZeRO 1, fp32: why" in text
    missed = ["nccl: tensor 2, fp32", "nccl: ZeRO 1, fp32", "nccl: int8"]
    assert gpu_results.missed(results, launches) == missed


def test_the_plain_model_computes_hvdlms_loss() -> None:
    import torch
    from plain_gpt import PlainLoop, Settings, Sizes

    config = small_config("torch", bias=False)
    spec = PRESETS["gpt"](config.model, 64, config.data.context)
    sizes = Sizes(config.model.layers, config.model.width, config.model.heads, config.data.context, 64)
    tokens = np.random.default_rng(0).integers(0, 64, 500).astype(np.int32)
    plain = PlainLoop(sizes, Settings(rows=4, bf16=False), tokens)
    plain.model.copy_from({p.name: p.initial(1) for p in spec.params})
    assert sizes.parameters == sum(p.numel() for p in plain.model.parameters())
    inputs, targets = plain.draw()
    batch = Batch(inputs.numpy().astype(np.int32), targets.numpy().astype(np.int32), None, True)
    total, count = single_rank_trainable(spec, config).eval_step(batch)
    with torch.no_grad():
        assert abs(plain.loss(inputs, targets).item() - total / count) < 1e-5


def test_a_pack_for_another_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no pack: gpu\.sh pack"):
        gpu_build.check_pack(tmp_path)
    (tmp_path / "pack.json").write_text('{"python": "2.7"}')
    with pytest.raises(SystemExit, match=r"the pack is for Python 2\.7, this is 3"):
        gpu_build.check_pack(tmp_path)


def test_pip_reads_nothing_but_the_pack(tmp_path: Path) -> None:
    env = gpu_build.pip_variables(tmp_path, {"PIP_INDEX_URL": "https://example.org", "HOME": "/root"})
    assert env["PIP_NO_INDEX"] == "1" and env["PIP_FIND_LINKS"] == str(tmp_path / "wheels")
    assert "PIP_INDEX_URL" not in env and env["PIP_CONFIG_FILE"] == os.devnull and env["HOME"] == "/root"
    (tmp_path / "headers" / "include").mkdir(parents=True)
    env = gpu_build.variables(tmp_path, {"PATH": "/bin", "CPATH": "/more"})
    assert env["CPATH"] == f"{tmp_path / 'headers' / 'include'}:/more" and env["PATH"] == f"{tmp_path / 'bin'}:/bin"


def test_the_shell_wrapper_is_sound() -> None:
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", str(SCRIPT)], timeout=60).returncode == 0
    shown = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and shown.stdout.count("benchmarks/gpu.sh") == 4
    for wrong in ([], ["fast"], ["all", "--limit", "soon"]):
        assert subprocess.run([str(SCRIPT), *wrong], capture_output=True, timeout=60).returncode == 2


def test_a_killed_call_is_continued_by_the_next(tmp_path: Path) -> None:
    """End to end in the short form: the call is killed after its first case, the next one does the others."""
    results = tmp_path / "results"
    arguments = ["all", "--short", "--limit", "600", "--results", str(results)]
    command, env = [sys.executable, "benchmarks/gpu.py", *arguments], environment(HVDLM_TEST_IMPORTS="torch")
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (results / "results.json").exists() and stored(tmp_path), 120, first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    before = stored(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = stored(tmp_path)
    assert {name: after[name] for name in before} == before  # not run again
    assert len(after) == 1 + 5 + 9 + 3 + 1 and all(case["attempts"] == 1 for case in after.values())
    table = (results / "table.md").read_text()
    assert table in done.stdout and "missed" not in table.partition("| two ranks |")[2]
    assert "| two ranks | bar | mpi4py | mpi |" in table and "one of two killed, resumed on one" in table
