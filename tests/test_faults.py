"""Faults of one of two ranks end the run in time, with one report of rank, call site and cause, and no leftovers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvdlm import cli
from hvdlm.diagnostics import failure_files
from launching import ONE_LAYER, ROOT, SMALL, environment, processes_of

# Seconds; TensorFlow's ranks wait for one that traces its graph anew.
TIMEOUT = {"torch": 3.0, "tensorflow": 5.0}
# Rank 1 fails in its fourth step. In TensorFlow the fault is part of a graph, which is traced anew for it.
FAULTY_RUN = """
import os, signal, sys, time
from pathlib import Path
from hvdlm import cli, hookimpl, telemetry
from hvdlm.protocols.group import Done
from hvdlm_backends.groups import HorovodGroup

FAULT, FRAMEWORK = {fault!r}, {framework!r}
def note():
    Path({noted!r}).write_text(str(time.time()))

def nap():
    note()
    time.sleep(1000)

def die():
    note()
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the lamp is out")

class FaultyRank:
    @hookimpl
    def hvdlm_run_started(self, world):
        self.rank = world.rank

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step):
        if step == 3 and self.rank == 1:
            nap() if FAULT == "sleep" else install()

def faulty_all_reduce(group, tensor, name, op="sum"):
    if FAULT == "skip":
        note()
        return Done(tensor)
    if FAULT == "shape":
        note()
        return Longer(real(group, tensor[:-1], name, op), tensor)  # call site
    if FRAMEWORK == "tensorflow":
        import tensorflow as tf
        def later(x):
            die()
        passed = tf.py_function(later, [tensor], tensor.dtype)
        passed.set_shape(tensor.shape)
        return real(group, passed, name, op)
    die()

class Longer(Done):
    def __init__(self, handle, tensor):
        if FRAMEWORK == "tensorflow":
            import tensorflow as tf
            super().__init__(tf.concat([handle.wait(), tensor[-1:]], 0))
        else:
            self.wait = handle.wait

real = HorovodGroup.all_reduce_async
def all_reduce_async(self, tensor, name, op="sum"):
    return (faulty_all_reduce if name == "gradients.1" else real)(self, tensor, name, op)

def install():
    HorovodGroup.all_reduce_async = all_reduce_async
    if FRAMEWORK == "tensorflow":
        from hvdlm_tensorflow.counted_graph import CountedGraph
        run = CountedGraph.__call__
        def call(self, key, *arguments):
            self.forget_traces()
            return run(self, key, *arguments)
        CountedGraph.__call__ = call

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), FaultyRank()]
sys.exit(cli.main())
"""


@dataclass
class Outcome:
    """How a faulty launch ended. ``seconds``: from the fault to the end of the last process."""

    code: int
    output: str
    seconds: float
    run: Path
    site: str


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a folder for temporary files, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hv"))
    yield folder
    shutil.rmtree(folder)


def launch_with_fault(launcher: str, framework: str, fault: str, folder: Path, scratch: Path) -> Outcome:
    run, script, noted = folder / "run", folder / "faulty_run.py", folder / "noted"
    script.write_text(FAULTY_RUN.format(fault=fault, framework=framework, noted=str(noted)))
    name, *options = launcher.split()
    options += ["--oversubscribe", "--bind-to", "none"] if name == "mpirun" else []
    command = [name, *options, "-np", "2", sys.executable, str(script), "--framework", framework, "--log.run", str(run)]
    command += [*SMALL, *ONE_LAYER, "--communication.bucket_bytes", "20000"]
    command += ["--communication.timeout", str(TIMEOUT[framework])]
    command += ["--train.steps", "100000", "--train.warmup", "5"]
    env = environment(TMPDIR=str(scratch), OMPI_MCA_btl_vader_backing_directory=str(scratch))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    limit = time.monotonic() + 10
    while processes_of(run) and time.monotonic() < limit:
        time.sleep(0.1)
    output = done.stdout + done.stderr
    assert noted.exists(), output[-3000:]
    line = next(i for i, text in enumerate(script.read_text().splitlines(), 1) if "# call site" in text)
    site = f"{folder.name}/faulty_run.py:{line}"
    return Outcome(done.returncode, output, time.time() - float(noted.read_text()), run, site)


CHAOS = pytest.mark.skipif("HVDLM_CHAOS" not in os.environ, reason="make chaos runs all faults on all launchers")
FAULTS = ["sleep", "skip", "shape", "raise", "kill"]
ASLEEP = pytest.mark.full(covered_by="torch; a collective that TensorFlow's rank 1 skips, for which rank 0 waits, too")
SKIPPED = pytest.mark.full(covered_by="TensorFlow; rank 1 that sleeps in torch, for which rank 0 waits, too")
CASES = [
    pytest.param("mpirun", "skip", "torch", marks=SKIPPED),
    ("mpirun", "skip", "tensorflow"),
    *(("mpirun", fault, framework) for fault in ("shape", "raise") for framework in ("torch", "tensorflow")),
    ("mpirun", "sleep", "torch"),
    pytest.param("mpirun", "sleep", "tensorflow", marks=ASLEEP),
]
# make test kills a rank in test_hybrid_runs.py
IN_CHAOS = [("mpirun", "kill"), *(("horovodrun --gloo", fault) for fault in FAULTS)]
CASES += [pytest.param(*case, framework, marks=CHAOS) for case in IN_CHAOS for framework in ("torch", "tensorflow")]


@pytest.mark.parametrize("launcher, fault, framework", CASES)
def test_a_fault_is_reported_once_with_rank_and_call_site(
    launcher: str, framework: str, fault: str, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = launch_with_fault(launcher, framework, fault, tmp_path, scratch)
    output = ended.output
    assert ended.code != 0, output[-3000:]
    assert ended.seconds < 1.5 * TIMEOUT[framework] + 30, output[-3000:]
    assert not processes_of(ended.run)
    assert [str(path) for path in scratch.rglob("*") if not path.is_dir()] == []
    if fault in ("sleep", "skip"):
        assert output.count("the run hangs") == 1, output[-5000:]
        assert "Not arrived there: rank 1." in output and f"called at hvdlm_{framework}/" in output, output[-5000:]
        assert "failed:" not in output
    if fault == "sleep":
        assert "in nap" in output, output[-5000:]
    if fault in ("skip", "shape"):
        assert "rank 1 differs from the expected order" in output, output[-5000:]
    if fault == "shape":
        assert output.count("hvdlm: rank 0 failed") == 1 and "rank 1 failed" not in output, output[-5000:]
        assert f"called at {ended.site}" in output, output[-5000:]
    if fault == "raise":
        assert output.count("hvdlm: rank 1 failed") == 1 and "rank 0 failed" not in output, output[-5000:]
        assert "the lamp is out" in output, output[-5000:]
    assert cli.main(["doctor", "--run", str(ended.run)]) == 0
    report = capsys.readouterr().out
    assert "rank 0: step" in report and "rank 1: step" in report
    if fault == "raise":
        assert 1 in failure_files.read_failures(failure_files.files_folder(ended.run))
