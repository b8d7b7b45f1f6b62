"""Ranks that hang or fail before they are connected, or after training, end all ranks in time with one sentence."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from hvdlm import cli
from launching import ONE_LAYER, SMALL, end_started_by, environment, launch, processes_of, wait_until

TIMEOUT = 4.0
# A rank that waits for others to connect, or for their last hooks, may do so for seconds in place of
# --communication.timeout and a minute.
FAULTY_RANK = """
import os, signal, sys, time
from hvdlm import cli, hookimpl, telemetry
from hvdlm.diagnostics import phases, watchdog
from hvdlm.diagnostics.phases import Process
from hvdlm.io import launcher_env

watchdog._STACK_SECONDS = watchdog._ABORT_SECONDS = 1.0
cli._RANK_0_SECONDS = 0.2
phases._BEAT_SECONDS = 0.4
rank, limit = launcher_env.rank_for_messages(), Process.limit
ended = []
Process.limit = property(
    lambda self: {limit} if self.phase.waits and (self.recorder is None or ended) else limit.fget(self)
)

class FaultyRank:
    @hookimpl
    def hvdlm_run_ended(self, summary):
        ended.append(True)
        if rank == 1:
            {at_the_end}

if rank == 1:
    {at_the_start}
plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), FaultyRank()]
sys.exit(cli.main())
"""


def launch_faulty(
    run: Path, framework: str, launcher: str, at_the_start: str = "pass", at_the_end: str = "pass", limit: float = 6.0
) -> tuple[int, str]:
    """Train for two steps on two ranks, of which rank 1 is faulty; return the exit code and what was printed."""
    script = FAULTY_RANK.format(at_the_start=at_the_start, at_the_end=at_the_end, limit=limit)
    options = ["--framework", framework, "--log.run", str(run), *SMALL, *ONE_LAYER, "--train.steps", "2"]
    options += ["--communication.timeout", str(TIMEOUT)]
    done = launch(launcher, 2, ["-c", script, *options], timeout=120)
    wait_until(lambda: not processes_of(run), 10)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo"])
def test_a_rank_that_never_connects_is_named(launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = launch_faulty(tmp_path / "run", "torch", launcher, at_the_start="time.sleep(1000)", limit=2.0)
    assert code == 1 and output.count("the run hangs") == 1, output[-5000:]
    assert "Rank 0 has been waiting for the other ranks to connect" in output, output[-5000:]
    assert "Not arrived: rank 1" in output
    assert cli.main(["doctor", "--run", str(tmp_path / "run")]) == 0
    assert "Not arrived: rank 1" in capsys.readouterr().out


SLOW_COMPILER = """
import sys, time
import torch
from hvdlm import cli
from hvdlm.diagnostics import phases
from hvdlm.io import launcher_env

def backend(graph, inputs):
    phases.STARTUP_SECONDS = 0.0
    time.sleep(4.0 if launcher_env.rank_for_messages() == 1 else 0.0)
    return graph.forward

compiled = torch.compile
torch.compile = lambda method: compiled(method, backend=backend)
sys.exit(cli.main())
"""


def test_a_rank_that_compiles_longer_is_waited_for(tmp_path: Path) -> None:
    options = ["--framework", "torch", "--log.run", str(tmp_path / "run"), *SMALL, *ONE_LAYER]
    options += ["--train.compile", "true"]
    options += ["--train.steps", "2", "--communication.timeout", "1.6"]
    done = launch("mpirun", 2, ["-c", SLOW_COMPILER, *options], timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("launcher, framework", [("mpirun", "torch"), ("horovodrun --gloo", "tensorflow")])
def test_a_library_missing_on_one_rank_ends_all(launcher: str, framework: str, tmp_path: Path) -> None:
    began = time.monotonic()
    without = f"sys.modules['horovod.{framework}'] = None"
    code, output = launch_faulty(tmp_path / "run", framework, launcher, at_the_start=without)
    assert code == (2 if launcher == "mpirun" else 1), output[-3000:]
    assert output.count("hvdlm: rank 1: ") == 1 and f"horovod.{framework}" in output, output[-3000:]
    assert time.monotonic() - began < 60 and "the run hangs" not in output


@pytest.mark.parametrize("launcher, framework", [("mpirun", "tensorflow"), ("horovodrun --gloo", "torch")])
def test_horovod_settings_that_differ_are_refused(launcher: str, framework: str, tmp_path: Path) -> None:
    other = "os.environ['HOROVOD_NUM_FINALIZER_THREADS'] = '3'"
    code, output = launch_faulty(tmp_path / "run", framework, launcher, at_the_start=other)
    assert code == (2 if launcher == "mpirun" else 1), output[-3000:]
    assert output.count("HOROVOD_NUM_FINALIZER_THREADS is '3' on rank 1 and not set on rank 0") == 1, output[-3000:]
    assert "the run hangs" not in output


@pytest.mark.parametrize("action", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(1000)"])
def test_a_rank_that_hangs_in_its_last_hook_is_named(action: str, tmp_path: Path) -> None:
    code, output = launch_faulty(tmp_path / "run", "torch", "mpirun", at_the_end=action, limit=2.0)
    assert code == 1 and output.count("the run hangs") == 1, output[-5000:]
    assert "Not arrived there: rank 1." in output, output[-5000:]
    assert ("It left no stack" if "SIGSTOP" in action else "in hvdlm_run_ended") in output, output[-5000:]


UNRESOLVED = """
    import socket
    def getaddrinfo(name, *asked, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    socket.getaddrinfo = getaddrinfo
"""


@pytest.mark.parametrize(
    "fault, words",
    [
        (UNRESOLVED, "can't be resolved on this machine"),
        ("os.environ['HOROVOD_GLOO_IFACE'] = 'nowhere0'", "network interfaces are"),
    ],
    ids=["the launcher's name", "interface"],
)
def test_gloo_refuses_addresses_that_it_cannot_use(fault: str, words: str, tmp_path: Path) -> None:
    code, output = launch_faulty(tmp_path / "run", "torch", "horovodrun --gloo", at_the_start=fault)
    assert code == 1 and output.count(words) == 1, output[-3000:]
    assert "Segmentation" not in output and "terminate called" not in output


def test_what_a_failed_test_leaves_running_is_ended(request: pytest.FixtureRequest) -> None:
    """A launch whose test has failed would spin until the last test."""
    process = subprocess.Popen(["sleep", "1000"], env=environment(), start_new_session=True)
    # Linux shows the environment of a program a moment after Popen has returned (10 times of 3,000 under load).
    wait_until(Path(f"/proc/{process.pid}/environ").read_bytes, 10, process)
    assert end_started_by(request.node.nodeid) == ["sleep 1000 "]
    assert process.wait(10) == -signal.SIGKILL
