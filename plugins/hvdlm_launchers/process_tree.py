"""A command with everything that it starts on this machine: to be signalled as one, and ended without leftovers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from hvdlm.errors import HvdlmError

MARK = "HVDLM_SUPERVISED"
"""The environment variable by which processes that a command started are known, whoever their parent is by now."""

LAUNCHERS = {"mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun"}
"""Pass SIGUSR1 on to their ranks, here and on other hosts."""

_SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}
_KEPT = 2**16  # bytes of standard error


class Launched:
    """A started command, in a session of its own, so that a terminal's Ctrl-C does not reach it by itself.

    Its standard input is empty, its standard output this process's; what it writes to standard error is passed on,
    and the end of it kept in ``errors``.

    Raises:
        HvdlmError: there is no such program.
    """

    def __init__(self, command: list[str]) -> None:
        self._mark = f"{os.getpid()}-{time.time_ns()}"
        environment = {**os.environ, MARK: self._mark}
        settings = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
        try:
            self._child = subprocess.Popen(command, env=environment, **settings)  # type: ignore[call-overload]
        except OSError as error:
            raise HvdlmError(f"{command[0]} can't be started: {error.strerror}: check the command after --.") from error
        self._errors = b""
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    @property
    def errors(self) -> list[str]:
        """The last lines of standard error."""
        return self._errors.decode(errors="replace").splitlines()

    def poll(self) -> int | None:
        """Return the exit code, 128 and the signal's number where one ended it; None while it runs."""
        code = self._child.poll()
        return 128 - code if code is not None and code < 0 else code

    def stop(self) -> None:
        """Ask the run to save and stop: SIGUSR1, which ``mpirun`` and ``srun`` pass on to the ranks.

        ``horovodrun --gloo`` would die of it: there the ranks of this machine get it themselves, which is enough for
        all to agree to stop.
        """
        self._send(signal.SIGUSR1)

    def end(self, grace: float = 3.0) -> int:
        """End everything: SIGTERM, so that launchers tidy up, then SIGKILL to what is left; return the exit code."""
        self._send(signal.SIGTERM)
        until = time.monotonic() + grace
        while (self.poll() is None or self._processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return self.finish()

    def finish(self) -> int:
        """Kill what the command left behind; return its exit code."""
        for _ in range(20):
            left = self._processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not left and self.poll() is not None:
                break
            time.sleep(0.1)
        self._reader.join(timeout=5)
        code = self.poll()
        return 1 if code is None else code

    def _send(self, number: signal.Signals) -> None:
        for process in self._targets():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _targets(self) -> list[psutil.Process]:
        """Return the launchers; without any, Gloo's ranks; without any, what isn't a shell; none below another."""
        alive = list(self._processes())
        programs = _where(alive, lambda process: process.name() not in _SHELLS)
        launchers = _where(programs, lambda process: process.name() in LAUNCHERS)
        ranks = _where(programs, lambda process: "HOROVOD_RANK" in process.environ())
        return _topmost(launchers or ranks or programs or alive)

    def _processes(self) -> list[psutil.Process]:
        return _where(psutil.process_iter(), lambda process: process.environ().get(MARK) == self._mark)

    def _pass_on(self) -> None:
        """Copy standard error as it comes; a closed one of ours doesn't stop the run."""
        assert self._child.stderr is not None
        with self._child.stderr as source:
            while data := os.read(source.fileno(), _KEPT):
                self._errors = (self._errors + data)[-_KEPT:]
                with contextlib.suppress(OSError):
                    os.write(2, data)


def _where(processes: Iterator[psutil.Process] | list[psutil.Process], good: Callable[[psutil.Process], bool]) -> list:
    """Return those that are good; what has gone, or belongs to somebody else, isn't."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            if good(process):
                found.append(process)
    return found


def _topmost(processes: list[psutil.Process]) -> list[psutil.Process]:
    pids = {process.pid for process in processes}
    return _where(processes, lambda process: process.ppid() not in pids)
