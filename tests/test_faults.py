"""Faults injected into one of two ranks: who, where and why is told once, in time, and nothing is left behind."""

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
from launching import ROOT, SMALL, environment

TIMEOUT = 6.0
# Rank 1 goes wrong in its fourth step. In TensorFlow a graph is what goes wrong, so that it is traced anew.
MEDDLER = """
import os, signal, sys, time
from pathlib import Path
from hvdlm import cli, hookimpl, telemetry
from hvdlm.protocols.group import Done
from hvdlm_backends.horovod import HorovodGroup

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

class Meddler:
    @hookimpl
    def hvdlm_run_started(self, world):
        self.rank = world.rank

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step):
        if step == 3 and self.rank == 1:
            nap() if FAULT == "sleep" else install()

def meddle(group, tensor, name, op="sum"):
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
    return (meddle if name == "gradients.1" else real)(self, tensor, name, op)

def install():
    HorovodGroup.all_reduce_async = all_reduce_async
    if FRAMEWORK == "tensorflow":
        from hvdlm_tensorflow.counted_graph import CountedGraph
        run = CountedGraph.__call__
        def call(self, key, *arguments):
            self.__init__(self._graph.python_function, self._wire)
            return run(self, key, *arguments)
        CountedGraph.__call__ = call

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), Meddler()]
sys.exit(cli.main())
"""


@dataclass
class Outcome:
    """How a launch with a fault ended. ``seconds``: from the fault to the end of the last process."""

    code: int
    said: str
    seconds: float
    run: Path
    site: str


def processes_of(run: Path) -> list[str]:
    """Return the command lines of processes that work on a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(run) in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a folder for temporary files, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hv"))
    yield folder
    shutil.rmtree(folder)


def launched(launcher: str, framework: str, fault: str, folder: Path, scratch: Path) -> Outcome:
    run, script, noted = folder / "run", folder / "meddler.py", folder / "noted"
    script.write_text(MEDDLER.format(fault=fault, framework=framework, noted=str(noted)))
    name, *options = launcher.split()
    options += ["--oversubscribe", "--bind-to", "none"] if name == "mpirun" else []
    command = [name, *options, "-np", "2", sys.executable, str(script), "--framework", framework, "--log.run", str(run)]
    command += [*SMALL, "--communication.bucket_bytes", "20000", "--communication.timeout", str(TIMEOUT)]
    command += ["--train.steps", "100000", "--train.warmup", "5"]
    env = environment(TMPDIR=str(scratch), OMPI_MCA_btl_vader_backing_directory=str(scratch))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    limit = time.monotonic() + 10
    while processes_of(run) and time.monotonic() < limit:
        time.sleep(0.1)
    said = done.stdout + done.stderr
    assert noted.exists(), said[-3000:]
    line = next(i for i, text in enumerate(script.read_text().splitlines(), 1) if "# call site" in text)
    site = f"{folder.name}/meddler.py:{line}"
    return Outcome(done.returncode, said, time.time() - float(noted.read_text()), run, site)


CHAOS = pytest.mark.skipif("HVDLM_CHAOS" not in os.environ, reason="make chaos runs all faults on all launchers")
FAULTS = ["sleep", "skip", "shape", "raise", "kill"]
CASES = [
    *(("mpirun", fault) for fault in FAULTS[:-1]),
    pytest.param("mpirun", "kill", marks=CHAOS),  # make test kills a rank in test_hybrid_runs.py
    *(pytest.param("horovodrun --gloo", fault, marks=CHAOS) for fault in FAULTS),
]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("launcher, fault", CASES)
def test_a_fault_is_told_once_with_rank_and_call_site(
    launcher: str, framework: str, fault: str, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = launched(launcher, framework, fault, tmp_path, scratch)
    said = ended.said
    assert ended.code != 0, said[-3000:]
    assert ended.seconds < 1.5 * TIMEOUT + 30, said[-3000:]
    assert not processes_of(ended.run)
    assert [str(path) for path in scratch.rglob("*") if not path.is_dir()] == []
    if fault in ("sleep", "skip"):
        assert said.count("the run hangs") == 1, said[-5000:]
        assert "Not arrived there: rank 1." in said and f"called at hvdlm_{framework}/" in said, said[-5000:]
        assert "failed:" not in said
    if fault == "sleep":
        assert "in nap" in said, said[-5000:]
    if fault in ("skip", "shape"):
        assert "rank 1 differs from the rule" in said, said[-5000:]
    if fault == "shape":
        assert said.count("hvdlm: rank 0 failed") == 1 and "rank 1 failed" not in said, said[-5000:]
        assert f"called at {ended.site}" in said, said[-5000:]
    if fault == "raise":
        assert said.count("hvdlm: rank 1 failed") == 1 and "rank 0 failed" not in said, said[-5000:]
        assert "the lamp is out" in said, said[-5000:]
    assert cli.main(["doctor", "--run", str(ended.run)]) == 0
    told = capsys.readouterr().out
    assert "rank 0: step" in told and "rank 1: step" in told
    assert set(failure_files.read_failures(failure_files.ledger_folder(ended.run))) >= (
        {1} if fault == "raise" else set()
    )
