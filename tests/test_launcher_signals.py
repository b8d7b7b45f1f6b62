"""Ctrl-C and SIGTERM to launchers: runs save where there is time, say so where there is none, and record their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from builders import case, file_names, read_json
from hvdlm.errors import BAD_INPUT, STOPPED
from hvdlm.io import launcher_env
from hvdlm.training.signals import LAUNCHER_ENDS, Signals
from launching import ONE_LAYER, ROOT, SMALL, environment, losses, wait_until, with_step_hook

MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"]
GLOO = ["horovodrun", "--gloo"]
VARIABLES = [*dict.fromkeys(name for names in launcher_env.VARIABLES.values() for name in names if name)]
VARIABLES += ["HOROVOD_GLOO_RENDEZVOUS_ADDR", "OMPI_MCA_odls_base_sigkill_timeout", launcher_env.SUPERVISED]

# Ranks ask who has sent a signal: to a fork of a warm process, its parent forwards what the launcher sends.
FORWARDED = """
import os
from hvdlm.io import launcher_env

is_launcher = launcher_env.is_open_mpi_launcher
launcher_env.is_open_mpi_launcher = lambda pid: pid == os.getppid() or is_launcher(pid)
"""


class Launched:
    """Two ranks under a launcher in a process group of its own, as a terminal would start them."""

    def __init__(
        self, launcher: list[str], framework: str, run: Path, action: str = "pass", fresh: bool = False
    ) -> None:
        self.run = run
        self.errors = run.with_suffix(".err")
        options = ["--framework", framework, "--log.run", str(run), *SMALL, *ONE_LAYER]
        options += ["--train.steps", "1000000"]
        flag, program = with_step_hook(action)
        command = [*launcher, "-np", "2", sys.executable, flag, program if fresh else FORWARDED + program, *options]
        # Launchers are processes of their own, which are sent signals.
        env = environment(**{"HVDLM_TEST_WARM" if fresh else "HVDLM_TEST_IMPORTS": ""})
        with self.errors.open("w") as errors:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)

    def wait_for_steps(self, count: int) -> None:
        path = self.run / "metrics.jsonl"
        wait_until(lambda: path.exists() and path.read_text().count("\n") >= count, 90)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to the process group, as Ctrl-C does; return the launcher's exit code."""
        os.killpg(self.process.pid, number)
        return self.process.wait(30)

    def ranks(self) -> list[psutil.Process]:
        def is_rank(process: psutil.Process) -> bool:
            try:
                return str(self.run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False

        return [process for process in psutil.process_iter() if is_rank(process)]

    def end(self) -> None:
        for process in [*self.ranks(), *([psutil.Process(self.process.pid)] if self.process.poll() is None else [])]:
            process.kill()
        self.process.wait(10)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Return ``start(launcher, framework, action, fresh)``; what is left of its processes is ended after the test."""
    started: list[Launched] = []

    def start(launcher: list[str], framework: str, action: str = "pass", fresh: bool = False) -> Launched:
        started.append(Launched(launcher, framework, tmp_path / "run", action, fresh))
        return started[-1]

    yield SimpleNamespace(start=start)
    for one in started:
        one.end()


@pytest.mark.parametrize(
    "launcher, framework, number",
    [
        (MPIRUN, "tensorflow", signal.SIGTERM),
        (GLOO, "torch", signal.SIGINT),
        (["horovodrun", "--mpi"], "torch", signal.SIGINT),
        case(MPIRUN, "torch", signal.SIGINT, covered_by="horovodrun --mpi, which starts mpirun; SIGTERM to mpirun"),
    ],
    ids=["mpirun-tensorflow", "gloo-torch", "horovodrun-mpi-torch", "mpirun-torch"],
)
def test_a_run_saves_before_its_launcher_kills_it(
    launched: SimpleNamespace, launcher: list[str], framework: str, number: signal.Signals
) -> None:
    one = launched.start(launcher, framework, fresh="horovodrun" in launcher)  # by --mpi, it asks for the real sender
    one.wait_for_steps(3)
    assert one.interrupt(number) != 0
    wait_until(lambda: not one.ranks(), 15)
    status = read_json(one.run / "status.json")
    assert (status["state"], status["code"]) == ("stopped", STOPPED), one.errors.read_text()[-3000:]
    assert file_names(one.run / "checkpoints") == ["latest", f"step-{status['step']:08d}"]
    assert len(losses(one.run)) == status["step"] and not (one.run / "flight_recorder").exists()
    printed = one.errors.read_text()
    assert "ranks are killed in " in printed and "stderr>:Traceback" not in printed
    assert launcher is GLOO or "Traceback" not in printed  # horovodrun's own


def test_a_run_without_time_to_save_says_so(launched: SimpleNamespace) -> None:
    one = launched.start(MPIRUN, "torch", "time.sleep(2.2)")
    one.wait_for_steps(3)
    assert one.interrupt() != 0
    wait_until(lambda: not one.ranks(), 15)
    status, printed = read_json(one.run / "status.json"), one.errors.read_text()
    assert status["state"] == "interrupted" and status["reason"] and status["step"] >= 2, status
    assert "Ctrl-C makes the launcher kill its ranks after 2 s. Use kill -USR1 " in printed
    assert f"hvdlm: {LAUNCHER_ENDS}: ranks are killed in 2 s: the run saves if that takes less, else it " in printed


def test_ranks_of_a_refused_configuration_promise_nothing(launched: SimpleNamespace) -> None:
    for launcher in (MPIRUN, GLOO):
        command = [*launcher, "-np", "2", sys.executable, "-m", "hvdlm", "--train.batch_size", "-3"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "train.batch_size is -3" in done.stderr
        assert "saves" not in done.stderr and str(BAD_INPUT) in done.stderr.rpartition("Exit code:")[2]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove what launchers and ``run`` set in the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables, seconds",
    [
        ({}, None),
        ({"SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0"}, 2.0),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_odls_base_sigkill_timeout": "30"}, 60.0),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_odls_base_sigkill_timeout": "soon"}, 2.0),
        ({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "a"}, 5.0),
    ],
)
def test_launchers_kill_after_a_known_time(
    no_launcher: pytest.MonkeyPatch, variables: dict[str, str], seconds: float | None
) -> None:
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert launcher_env.kill_seconds() == seconds


def test_slow_saves_are_announced_once_with_the_remedy(
    no_launcher: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Signals(0).warn_of_limit(1000.0)
    no_launcher.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "a")
    signals = Signals(0)
    for seconds in (4.0, 6.0, 7.0):
        signals.warn_of_limit(seconds)
    Signals(1).warn_of_limit(6.0)
    printed = capsys.readouterr().err
    assert printed.startswith("hvdlm: to stop and save takes 6 s, but Ctrl-C makes the launcher kill its ranks after ")
    assert f"Use kill -USR1 {os.getpid()} instead" in printed and printed.count("\n") == 1
    no_launcher.setenv(launcher_env.SUPERVISED, "1")  # which wait for the save
    Signals(0).warn_of_limit(6.0)
    assert not capsys.readouterr().err


def test_what_is_promised_depends_on_the_sender(
    no_launcher: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_launcher.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "a")
    noted: list[tuple[str, int | None]] = []
    usr1, term = signal.SIGUSR1, signal.SIGTERM
    for number, connected, checkpoint in [
        (usr1, False, None),
        (usr1, True, None),
        (term, True, None),
        (term, True, 40),
    ]:
        signals = Signals(1)
        signals.connected, signals.checkpoint = connected, checkpoint
        signals.on_request = lambda reason, code: noted.append((reason, code))
        signals._handle(number)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hvdlm: rank 1: SIGUSR1: the run stops before its first step; once more stops at once."
    assert lines[1] == "hvdlm: rank 1: SIGUSR1: the run saves after this step and stops; once more stops at once."
    assert "ranks are killed in 5 s: the run saves if that takes less, else it starts again" in lines[2]
    assert "else it resumes from step 40" in lines[3]
    assert noted == [("SIGUSR1", None)] * 2 + [("SIGTERM", None)] * 2


def test_the_launchers_notice_counts_as_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    signals = Signals(0)
    signals.abort = ended.append
    signals._handle_launcher()
    signals._handle_launcher()
    signals._first -= 10
    signals._handle(signal.SIGTERM)  # the launcher's own, later
    assert signals.received and not ended and capsys.readouterr().err.count(LAUNCHER_ENDS) == 1
    signals._handle(signal.SIGINT)  # the user's
    assert ended == [128 + signal.SIGINT]


def test_a_note_that_blocks_delays_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.training.signals._NOTE_SECONDS", 0.01)
    signals, ended, blocked = Signals(0), [], threading.Event()
    signals.abort = ended.append
    signals.on_request = lambda reason, code: blocked.wait(20)
    signals._handle(signal.SIGINT)
    signals._first -= 10
    signals._handle(signal.SIGINT)
    blocked.set()
    assert ended == [130]
