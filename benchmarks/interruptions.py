"""What chaos.py needs to interrupt runs: launches of a run, and the kinds of interruptions.

A kind is an entry of ``KINDS`` in chaos.py: ``Kind(interrupt=...)`` and whatever differs from a kill. What the kinds of
one sort need beyond that stands in a module of its own.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import environment

from hvdlm.checkpoints.discovery import step_folders
from hvdlm.errors import STOPPED
from hvdlm.training.signals import SIGNALS

RANKS = 2
EVERY = 3  # steps between checkpoints
MODEL = ["--model.width", "64", "--model.heads", "2", "--data.context", "32"]
OPTIONS = [*MODEL, "--train.batch_size", "16", "--train.warmup", "5", "--log.every", "1"]
OPTIONS += ["--checkpoint.every", str(EVERY), "--train.eval_every", "40", "--train.replica_check_every", "10"]
OPTIONS += ["--data.validation_share", "0.01"]
LIMIT = 30.0  # seconds after an interruption within which the launcher has to exit


class Violation(Exception):
    """A run did what it must not do; the message says what."""


@dataclass(frozen=True)
class Program:
    """What ranks execute: ``python`` with these words before the options of ``train``, these options after them.

    ``launcher``: the launcher and its options.
    """

    words: Sequence[str] = ("-m", "hvdlm")
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: Sequence[str] = ("mpirun", "--bind-to", "none", "--oversubscribe")


class Attempt:
    """A launch of a run in ``folder``, and the processes of its ranks.

    ``size``: options of its steps and its model. ``resume``: a checkpoint to resume from; None: the newest one, or the
    start where there is none.
    """

    def __init__(
        self,
        framework: str,
        folder: Path,
        size: Sequence[str],
        program: Program = Program(),
        resume: Path | None = None,
    ) -> None:
        self.folder = folder
        self.resume = resume
        python = [sys.executable, *program.words, "--framework", framework, "--log.run", str(folder), *OPTIONS]
        python += [*size, *program.options]
        saved = [step for step, path in step_folders(folder / "checkpoints") if resume in (None, path)]
        self.first_step = saved[0] if saved else 0  # the step from which it resumes
        if saved:
            python += ["--checkpoint.resume", str(resume or "auto")]
        elif folder.exists():
            python += ["--log.overwrite", "true"]
        self.command = [*program.launcher, "-np", str(RANKS), *python]
        self.environment = environment() | program.environment
        self._errors = tempfile.TemporaryFile("w+")
        streams = {"stdout": subprocess.DEVNULL, "stderr": self._errors, "env": self.environment}
        self.process = subprocess.Popen(self.command, start_new_session=True, **streams)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks that are alive."""
        return [p for p in psutil.process_iter(["cmdline"]) if self._is_rank(p)]

    def _is_rank(self, process: psutil.Process) -> bool:
        arguments = process.info["cmdline"] or []
        programs = {Path(word).name for word in arguments[:2]}
        return str(self.folder) in arguments and not programs & {"mpirun", "horovodrun"}

    def running(self) -> bool:
        """Return whether the launcher is alive."""
        return self.process.poll() is None

    def step(self) -> int:
        """Return the last step in ``metrics.jsonl``; -1 where there is none."""
        path = self.folder / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            return int(json.loads(path.read_text().splitlines()[-1])["step"])
        return -1

    def wait(self) -> int:
        """Wait until the launcher and all ranks have exited; return the launcher's exit code."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired as expired:
            raise Violation(f"the launcher is alive {LIMIT:.0f} s after the interruption: {self.errors()}") from expired
        end = time.monotonic() + 5
        while self.ranks():
            if time.monotonic() > end:
                raise Violation(f"ranks outlive their launcher: {self.ranks()}")
            time.sleep(0.05)
        return code

    def errors(self) -> str:
        """Return the end of standard error."""
        self._errors.seek(0)
        return self._errors.read()[-3000:]


def wait_for(attempt: Attempt, condition: Callable[[], bool], seconds: float, every: float = 0.05) -> None:
    """Wait until ``condition`` holds, the run has ended or ``seconds`` are over.

    Asking more often than every 50 ms takes noticeable processor time from the run.
    """
    end = time.monotonic() + seconds
    while attempt.running() and time.monotonic() < end and not condition():
        time.sleep(every)


def wait_for_training(attempt: Attempt) -> None:
    """Wait until the training loop of this attempt has started."""
    status = attempt.folder / "status.json"
    now = time.time()

    def started() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(status.read_text())["time"] > now
        return False

    wait_for(attempt, started, 60)


def kill(attempt: Attempt, chance: random.Random) -> None:
    """Kill a random rank: 1 time in 10 before it trains, 1 in 10 in its first steps, 5 in 10 while it saves."""
    case = chance.random()
    if case < 0.1:
        wait_for(attempt, lambda: len(attempt.ranks()) == RANKS, 20)
        time.sleep(chance.uniform(0, 4))
    else:
        wait_for_training(attempt)
        if case > 0.2:  # the first step may take long: graphs are built
            wait_for(attempt, lambda: attempt.step() > attempt.first_step, 60)
        time.sleep(chance.uniform(0, 1.5))
    if case > 0.5:
        folder = attempt.folder / "checkpoints"
        wait_for(attempt, lambda: any(folder.glob(".step-*.partial")), 60, every=0.001)
        time.sleep(chance.uniform(0, 0.02))
    send(attempt, chance, signal.SIGKILL)


def handles_signals(rank: psutil.Process) -> bool:
    """Return whether a process has installed its signal handlers: until then, Python is starting."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)
    return False


def stop(attempt: Attempt, chance: random.Random) -> None:
    """Ask a random rank to stop, at a random moment after the handlers are installed."""
    wait_for(attempt, lambda: [handles_signals(rank) for rank in attempt.ranks()] == [True] * RANKS, 60)
    if chance.random() < 0.8:
        wait_for_training(attempt)
        time.sleep(chance.uniform(0, 2))
    else:
        time.sleep(chance.uniform(0, 5))
    send(attempt, chance, chance.choice(SIGNALS))


def send(attempt: Attempt, chance: random.Random, number: int) -> None:
    """Send a signal to a random rank."""
    ranks = attempt.ranks()
    if ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(ranks).send_signal(number)


def losses(folder: Path) -> list[float]:
    """Return the loss of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_losses(folder: Path, expected: list[float], tolerance: float) -> None:
    """Check that a run that has ended logged the losses of all steps, as the undisturbed run did."""
    try:
        difference = max((abs(a - b) for a, b in zip(losses(folder), expected, strict=True)), default=0.0)
    except ValueError as error:
        raise Violation(f"{folder}/metrics.jsonl lacks steps, or has some of them twice") from error
    if difference > tolerance:
        raise Violation(f"losses differ by {difference:.3g} from the undisturbed run's, allowed: {tolerance:g}")


def was_killed(attempt: Attempt, code: int) -> bool:
    """Return whether a kill came before the end: any exit code but 0 will do, damaged checkpoints won't."""
    if code and "damaged" in attempt.errors():
        raise Violation(f"a restart reports an error: {attempt.errors()}")
    return code != 0


def was_stopped(attempt: Attempt, code: int) -> bool:
    """Return whether a request to stop came before the end: the run has to exit with 75, without an error."""
    if code not in (0, STOPPED):
        raise Violation(f"a stopped run exited with code {code}, not {STOPPED}: {attempt.errors()}")
    if "Traceback" in attempt.errors() or "damaged" in attempt.errors():
        raise Violation(f"a restart reports an error: {attempt.errors()}")
    return code == STOPPED


def plain(chance: random.Random) -> Program:
    """Return ``python -m hvdlm`` as it is."""
    return Program()


def newest(folder: Path, chance: random.Random) -> Path | None:
    """Resume from the newest checkpoint."""
    return None


@dataclass(frozen=True)
class Kind:
    """A kind of interruption: what happens to a launch, how it has to end, and how the run continues.

    Attributes:
        interrupt: interrupts a launch, at a random moment; a launch that it lets end is fine.
        count: interruptions in the full form, of all frameworks together.
        ended: returns whether the interruption took place, given the launcher's exit code.
        program: what the launches execute as long as interruptions follow.
        resume: the checkpoint from which the next launch resumes; None: ``--checkpoint.resume auto``.
        check: compares the folder of a run that has ended with the undisturbed run's losses, within a tolerance.

    ``interrupt``, ``ended`` and ``check`` raise a ``Violation`` where the run did what it must not do.
    """

    interrupt: Callable[[Attempt, random.Random], None]
    count: int = 30
    ended: Callable[[Attempt, int], bool] = was_killed
    program: Callable[[random.Random], Program] = plain
    resume: Callable[[Path, random.Random], Path | None] = newest
    check: Callable[[Path, list[float], float], None] = check_losses
