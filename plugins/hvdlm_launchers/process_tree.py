"""A command with all processes that it starts on this machine, signalled and ended as one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import psutil

from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm_launchers.launcher_output import OutputCleaner

MARK = launcher_env.SUPERVISED
"""Environment variable that identifies the processes of a command, even those whose parent has exited."""

LAUNCHERS = {"mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun"}
"""Programs that forward SIGUSR1 to their ranks, on this and on other hosts."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}
_ERROR_BYTES = 2**16  # how much of standard error is kept


@contextlib.contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Install ``handler`` for the time of the context; for SIGHUP, too, unless it is ignored (nohup)."""
    numbers = [*_SIGNALS, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class ProcessTree:
    """A started command, in a session of its own, so that Ctrl-C in a terminal does not reach it directly.

    Its standard output is this process's, or is copied there through ``clean_output``. Its standard error is copied to
    this process's, through ``clean_errors`` where given; the last lines are in ``errors``.

    Args:
        command: the program and its arguments.
        environ: its environment; None: this process's.
        stdin: its standard input, as of ``subprocess.Popen``; by default it is empty.
        clean_output: what is shown of its standard output.
        clean_errors: what is shown of its standard error.

    Raises:
        HvdlmError: there is no such program.
    """

    def __init__(
        self,
        command: list[str],
        environ: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        clean_output: OutputCleaner | None = None,
        clean_errors: OutputCleaner | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        # Below another process tree, the processes belong to both.
        self._mark = f"{os.getpid()}-{time.time_ns()}"
        marks = " ".join(filter(None, [environ.get(MARK), self._mark]))
        settings: dict[str, Any] = {"stdin": stdin, "stderr": subprocess.PIPE, "start_new_session": True}
        settings |= {"stdout": subprocess.PIPE} if clean_output else {}
        try:
            self._child = subprocess.Popen(command, env={**environ, MARK: marks}, **settings)
        except OSError as error:
            raise HvdlmError(f"{command[0]} can't be started: {error.strerror}: check the command after --.") from error
        self._errors = b""
        self._readers = [threading.Thread(target=self._copy, args=(self._child.stderr, 2, clean_errors), daemon=True)]
        if clean_output:
            output = (self._child.stdout, 1, clean_output)
            self._readers.append(threading.Thread(target=self._copy, args=output, daemon=True))
        for reader in self._readers:
            reader.start()

    @property
    def errors(self) -> list[str]:
        """The last lines of standard error."""
        return self._errors.decode(errors="replace").splitlines()

    def poll(self) -> int | None:
        """Return the exit code (128 plus the signal's number if a signal ended it), or None while it runs."""
        code = self._child.poll()
        return 128 - code if code is not None and code < 0 else code

    def request_stop(self) -> None:
        """Ask the run to save and stop: SIGUSR1, which ``mpirun`` and ``srun`` forward to the ranks.

        ``horovodrun --gloo`` would be killed by it. There the ranks of this machine get the signal directly, which is
        enough for all ranks to agree to stop.
        """
        self._send(signal.SIGUSR1)

    def terminate(self, grace: float = 3.0) -> int:
        """End all processes and return the exit code: SIGTERM, so that launchers clean up, SIGKILL after ``grace``."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while (self.poll() is None or self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.finish()

    def finish(self) -> int:
        """Kill the processes that the command left behind; return its exit code."""
        for _ in range(20):
            remaining = self._processes()
            for process in remaining:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not remaining and self.poll() is not None:
                break
            time.sleep(0.1)
        for reader in self._readers:
            reader.join(timeout=5)
        code = self.poll()
        return 1 if code is None else code

    def _send(self, number: signal.Signals) -> None:
        for process in self._targets():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _targets(self) -> list[psutil.Process]:
        """Return the launchers; without any, the ranks of Gloo; without any, what is no shell; none below another."""
        alive = self._processes()
        programs = _where(alive, lambda process: process.name() not in _SHELLS)
        launchers = _where(programs, lambda process: process.name() in LAUNCHERS)
        rank_variable = launcher_env.VARIABLES[launcher_env.HOROVODRUN].rank
        ranks = _where(programs, lambda process: rank_variable in process.environ())
        return _topmost(launchers or ranks or programs or alive)

    def _processes(self) -> list[psutil.Process]:
        return _where(psutil.process_iter(), lambda process: self._mark in process.environ().get(MARK, "").split())

    def _copy(self, source: IO[bytes], target: int, cleaner: OutputCleaner | None) -> None:
        """Copy a stream as it comes; where this process's is closed, the run continues."""
        with source:
            while data := os.read(source.fileno(), _ERROR_BYTES):
                if target == 2:
                    self._errors = (self._errors + data)[-_ERROR_BYTES:]
                _write(target, cleaner.feed(data) if cleaner else data)
            if cleaner:
                _write(target, cleaner.end())


def _write(target: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]


def _where(processes: Iterable[psutil.Process], condition: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the processes that meet ``condition``; those that have exited or belong to another user do not."""
    matches = []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            if condition(process):
                matches.append(process)
    return matches


def _topmost(processes: list[psutil.Process]) -> list[psutil.Process]:
    pids = {process.pid for process in processes}
    return _where(processes, lambda process: process.ppid() not in pids)
