"""Runs on 2 ranks that are interrupted at random moments and restarted, compared with an undisturbed run.

    python benchmarks/chaos.py [torch tensorflow] [--kills 200] [--stops 50] [--steps 150] [--seed 1] [--short]

A kill is a SIGKILL of a random rank at any moment, half of the time while a checkpoint is being written. A stop is a
SIGTERM, SIGINT or SIGUSR1 to a random rank; the run has to save and exit with code 75. Every restart has to find a
complete checkpoint, the losses have to equal those of the undisturbed run (torch: bit for bit), and no process,
temporary file or shared memory may remain. The exit code is 1 at the first violation.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
from harness import Bar, environment, make_parser, parse, report

from hvdlm.checkpoints import load
from hvdlm.checkpoints.discovery import step_folders
from hvdlm.errors import STOPPED
from hvdlm.io.atomic_files import sha256
from hvdlm.training.signals import SIGNALS

RANKS = 2
EVERY = 3  # steps between checkpoints
FULL = {"kills": 200, "stops": 50, "steps": 150}
SHORT = {"kills": 1, "stops": 1, "steps": 45}
NONE = Bar(at_most=0)
TOLERANCE = {"torch": 0.0, "tensorflow": 1e-5}
MODEL = ["--model.layers", "2", "--model.width", "64", "--model.heads", "2", "--data.context", "32"]
OPTIONS = [*MODEL, "--train.batch_size", "16", "--train.warmup", "5", "--log.every", "1"]
OPTIONS += ["--checkpoint.every", str(EVERY), "--train.eval_every", "40", "--train.replica_check_every", "10"]
LIMIT = 30.0  # seconds after an interruption within which the launcher has to exit
Interruption = Callable[["Attempt", random.Random], None]


class Violation(Exception):
    """A run did what it must not do; the message says what."""


class Attempt:
    """A launch of a run of ``length`` steps in ``folder``, and the processes of its ranks."""

    def __init__(self, framework: str, folder: Path, length: int) -> None:
        self.folder = folder
        python = [sys.executable, "-m", "hvdlm", "--framework", framework, "--log.run", str(folder), *OPTIONS]
        python += ["--train.steps", str(length)]
        saved = step_folders(folder / "checkpoints")
        self.first_step = saved[0][0] if saved else 0  # the step from which it resumes
        if saved:
            python += ["--checkpoint.resume", "auto"]
        elif folder.exists():
            python += ["--log.overwrite", "true"]
        command = ["mpirun", "--bind-to", "none", "--oversubscribe", "-np", str(RANKS), *python]
        self._errors = tempfile.TemporaryFile("w+")
        streams = {"stdout": subprocess.DEVNULL, "stderr": self._errors, "env": environment()}
        self.process = subprocess.Popen(command, start_new_session=True, **streams)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks that are alive."""
        return [p for p in psutil.process_iter(["cmdline"]) if self._is_rank(p)]

    def _is_rank(self, process: psutil.Process) -> bool:
        arguments = process.info["cmdline"] or []
        return str(self.folder) in arguments and "mpirun" not in Path(arguments[0]).name

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


def check_checkpoints(folder: Path, newest: int) -> int:
    """Verify the files of all checkpoints; return the step of the newest, which must be ``newest`` or later."""
    if newest and not (folder / "checkpoints").is_dir():
        raise Violation(f"{folder} has lost its checkpoints")
    opened = [load.open_checkpoint(path) for _, path in step_folders(folder / "checkpoints")]
    for saved in opened:
        for name, entry in saved.manifest["files"].items():
            if sha256(saved.path / name) != entry["sha256"]:
                raise Violation(f"{saved.path / name} has another SHA-256 than its manifest says")
    step = opened[0].step if opened else 0
    if step < newest:
        raise Violation(f"there was a checkpoint of step {newest}, now the newest is that of step {step}")
    return step


def run_interrupted(
    framework: str, folder: Path, length: int, interrupt: Interruption, limit: int, chance: random.Random
) -> int:
    """Train to the end with ``limit`` interruptions at most; return how many ended an attempt."""
    hits, newest = 0, 0
    while True:
        attempt = Attempt(framework, folder, length)
        if hits < limit:
            interrupt(attempt, chance)
        else:
            wait_for(attempt, lambda: False, 300)
        code = attempt.wait()
        newest = check_checkpoints(folder, newest)
        if code == 0:
            return hits
        if hits >= limit:
            raise Violation(f"an undisturbed restart exited with code {code}: {attempt.errors()}")
        if interrupt is stop and code != STOPPED:
            raise Violation(f"a stopped run exited with code {code}, not {STOPPED}: {attempt.errors()}")
        if "damaged" in attempt.errors() or (interrupt is stop and "Traceback" in attempt.errors()):
            raise Violation(f"a restart reports an error: {attempt.errors()}")
        hits += 1


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Give launches a temporary folder of their own; check that it is empty afterwards, and shared memory as before.

    Shared memory that a living process has mapped belongs to another run on this machine.
    """
    prefixes = ("ompi", "vader", "sm_segment", "pmix", "hvdlm")
    shared = Path("/dev/shm")
    before = set(shared.glob("*"))
    with tempfile.TemporaryDirectory(prefix="hvdlm-") as name:
        with mock.patch.dict(os.environ, TMPDIR=name):
            yield

        def left() -> list[Path]:
            new = [path for path in set(shared.glob("*")) - before if path.name.startswith(prefixes)]
            return [*Path(name).iterdir(), *(path for path in new if not mapped(path))]

        for _ in range(10):  # files of another run may be appearing or disappearing just now
            if not left():
                return
            time.sleep(0.5)
        raise Violation(f"left behind: {', '.join(map(str, left()))}")


def mapped(path: Path) -> bool:
    """Return whether a living process has mapped the file."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def check_folder(folder: Path, expected: list[float], tolerance: float) -> None:
    """Check that a run's folder holds the losses of all steps, and nothing temporary."""
    difference = max((abs(a - b) for a, b in zip(losses(folder), expected, strict=True)), default=0.0)
    if difference > tolerance:
        raise Violation(f"losses differ by {difference:.3g} from the undisturbed run's, allowed: {tolerance:g}")
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*")] + [p.name for p in folder.glob("flight_recorder")]
    if left:
        raise Violation(f"left behind in the run's folder: {', '.join(left)}")


def campaign(framework: str, length: int, counts: dict[Interruption, int], seed: int) -> None:
    """Interrupt runs of ``length`` steps, as many runs as it takes for these counts of interruptions.

    Raises:
        Violation: something was lost, hung or left behind.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-chaos-") as name, nothing_left_behind():
        undisturbed = Path(name) / "undisturbed"
        run_interrupted(framework, undisturbed, length, kill, 0, random.Random(seed))
        expected, runs = losses(undisturbed), 0
        for interrupt, count in counts.items():
            kind = interrupt.__name__
            chance, began, hits = random.Random(f"{framework} {kind} {seed}"), time.monotonic(), 0
            while hits < count:
                folder = Path(name) / f"run-{runs}"
                runs += 1
                hits += run_interrupted(framework, folder, length, interrupt, count - hits, chance)
                check_folder(folder, expected, TOLERANCE[framework])
                seconds = time.monotonic() - began
                print(f"{framework}, {kind}: {hits} of {count} in {runs} run(s), {seconds:.0f} s", flush=True)


def main() -> int:
    """Interrupt runs of each framework; return 1 at the first violation."""
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"), help="default: random")
    o = parse(parser, FULL, SHORT)
    print(f"seed {o.seed}", flush=True)
    # Both numbers are those of all frameworks together.
    counts = {kill: -(-o.kills // len(o.frameworks)), stop: -(-o.stops // len(o.frameworks))}
    for framework in o.frameworks:
        title = f"violations after {counts[kill]} kill(s) and {counts[stop]} stop(s), {framework}"
        try:
            campaign(framework, o.steps, counts, o.seed)
        except Violation as violation:
            report(title, 1, NONE)
            print(f"{framework}: FAILED: {violation}", flush=True)
            return 1
        report(title, 0, NONE)
    print(f"{o.kills} kills and {o.stops} stops: nothing lost, nothing hung, nothing left behind", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
