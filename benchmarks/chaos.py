"""Breaks runs on 2 ranks at random moments, restarts them, and compares what comes out with an undisturbed run.

python benchmarks/chaos.py [torch tensorflow] [--kills 200] [--stops 50] [--steps 150] [--seed 1]

A kill is a SIGKILL of a random rank: at any moment, half of them while a checkpoint is being written. A stop is a
SIGTERM, SIGINT or SIGUSR1 to a random rank, which has to save and end with exit code 75. Every restart has to find a
whole checkpoint, losses have to equal those of the undisturbed run (torch: bit for bit), nothing may stay behind.
"""

from __future__ import annotations

import argparse
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
from pairing import FRAMEWORKS, environment

from hvdlm.checkpoints import load
from hvdlm.checkpoints.retention import steps
from hvdlm.errors import STOPPED
from hvdlm.io.atomic_files import sha256
from hvdlm.training.signals import SIGNALS

RANKS, EVERY = 2, 3
TOLERANCE = {"torch": 0.0, "tensorflow": 1e-5}
MODEL = ["--model.layers", "2", "--model.width", "64", "--model.heads", "2", "--data.context", "32"]
OPTIONS = [*MODEL, "--train.batch_size", "16", "--train.warmup", "5", "--log.every", "1"]
OPTIONS += ["--checkpoint.every", str(EVERY), "--train.eval_every", "40", "--train.replica_check_every", "10"]
LIMIT = 30.0  # seconds in which a broken run has to be gone
Harm = Callable[["Attempt", random.Random], None]


class Broken(Exception):
    """What must not happen has happened; the text says what."""


class Attempt:
    """A launch of a run of so many steps in ``folder``, and its ranks' processes."""

    def __init__(self, framework: str, folder: Path, length: int) -> None:
        self.folder = folder
        python = [sys.executable, "-m", "hvdlm", "--framework", framework, "--log.run", str(folder), *OPTIONS]
        python += ["--train.steps", str(length)]
        known = steps(folder / "checkpoints")
        self.begins = known[0][0] if known else 0  # the step that it goes on from
        if known:
            python += ["--checkpoint.resume", "auto"]
        elif folder.exists():
            python += ["--log.overwrite", "true"]
        command = ["mpirun", "--bind-to", "none", "--oversubscribe", "-np", str(RANKS), *python]
        self._errors = tempfile.TemporaryFile("w+")
        streams = {"stdout": subprocess.DEVNULL, "stderr": self._errors, "env": environment()}
        self.process = subprocess.Popen(command, start_new_session=True, **streams)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks that live."""
        return [p for p in psutil.process_iter(["cmdline"]) if self._is_rank(p)]

    def _is_rank(self, process: psutil.Process) -> bool:
        words = process.info["cmdline"] or []
        return str(self.folder) in words and "mpirun" not in Path(words[0]).name

    def running(self) -> bool:
        """Return whether the launcher lives."""
        return self.process.poll() is None

    def step(self) -> int:
        """Return the last step that this run has told of."""
        path = self.folder / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            return int(json.loads(path.read_text().splitlines()[-1])["step"])
        return -1

    def gone(self) -> int:
        """Wait until all is gone; return the launcher's exit code."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired as expired:
            raise Broken(f"the launcher lives {LIMIT:.0f} s after the blow: {self.errors()}") from expired
        end = time.monotonic() + 5
        while self.ranks():
            if time.monotonic() > end:
                raise Broken(f"ranks outlive their launcher: {self.ranks()}")
            time.sleep(0.05)
        return code

    def errors(self) -> str:
        """Return the end of what was said on standard error."""
        self._errors.seek(0)
        return self._errors.read()[-3000:]


def wait_for(attempt: Attempt, what: Callable[[], bool], seconds: float, every: float = 0.05) -> None:
    """Wait until ``what`` is so, the run is over or ``seconds`` are; who looks more often takes a core from the run."""
    end = time.monotonic() + seconds
    while attempt.running() and time.monotonic() < end and not what():
        time.sleep(every)


def training(attempt: Attempt) -> None:
    """Wait until this attempt has begun to train."""
    status = attempt.folder / "status.json"
    began = time.time()

    def begun() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(status.read_text())["time"] > began
        return False

    wait_for(attempt, begun, 60)


def kill(attempt: Attempt, chance: random.Random) -> None:
    """Kill a random rank: one in ten before it trains, one in ten in its first steps, half while it saves."""
    kind = chance.random()
    if kind < 0.1:
        wait_for(attempt, lambda: len(attempt.ranks()) == RANKS, 20)
        time.sleep(chance.uniform(0, 4))
    else:
        training(attempt)
        if kind > 0.2:  # the first step may take long: graphs are built
            wait_for(attempt, lambda: attempt.step() > attempt.begins, 60)
        time.sleep(chance.uniform(0, 1.5))
    if kind > 0.5:
        folder = attempt.folder / "checkpoints"
        wait_for(attempt, lambda: any(folder.glob(".step-*.partial")), 60, every=0.001)
        time.sleep(chance.uniform(0, 0.02))
    strike(attempt, chance, signal.SIGKILL)


def listens(rank: psutil.Process) -> bool:
    """Return whether a process catches signals yet: before that, it is Python that starts."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)
    return False


def stop(attempt: Attempt, chance: random.Random) -> None:
    """Ask a random rank to stop, at a random moment after the command has started."""
    wait_for(attempt, lambda: [listens(rank) for rank in attempt.ranks()] == [True] * RANKS, 60)
    if chance.random() < 0.8:
        training(attempt)
        time.sleep(chance.uniform(0, 2))
    else:
        time.sleep(chance.uniform(0, 5))
    strike(attempt, chance, chance.choice(SIGNALS))


def strike(attempt: Attempt, chance: random.Random, number: int) -> None:
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
    """Return the step of the newest checkpoint, all of whose files have been read; none may have been lost."""
    if newest and not (folder / "checkpoints").is_dir():
        raise Broken(f"{folder} has lost its checkpoints")
    found = [load.open_checkpoint(path) for _, path in steps(folder / "checkpoints")]
    for one in found:
        for name, entry in one.manifest["files"].items():
            if sha256(one.path / name) != entry["sha256"]:
                raise Broken(f"{one.path / name} has another SHA-256")
    step = found[0].step if found else 0
    if step < newest:
        raise Broken(f"the checkpoint of step {newest} was there, now the newest is that of step {step}")
    return step


def disturbed(framework: str, folder: Path, length: int, harm: Harm, blows: int, chance: random.Random) -> int:
    """Run to the end, harmed as long as there are ``blows`` left; return how many hit."""
    hits = newest = 0
    while True:
        attempt = Attempt(framework, folder, length)
        if hits < blows:
            harm(attempt, chance)
        else:
            wait_for(attempt, lambda: False, 300)
        code = attempt.gone()
        newest = check_checkpoints(folder, newest)
        if code == 0:
            return hits
        if hits >= blows:
            raise Broken(f"an undisturbed restart ended with code {code}: {attempt.errors()}")
        if harm is stop and code != STOPPED:
            raise Broken(f"a stopped run ended with code {code}, not {STOPPED}: {attempt.errors()}")
        if "damaged" in attempt.errors() or (harm is stop and "Traceback" in attempt.errors()):
            raise Broken(f"a restart complains: {attempt.errors()}")
        hits += 1


@contextlib.contextmanager
def nothing_stays() -> Iterator[None]:
    """Give launches a temporary folder of their own; check that it is empty afterwards, and shared memory as before.

    Of shared memory, what a living process has mapped is somebody else's, whose run goes on beside this one.
    """
    known, shared = ("ompi", "vader", "sm_segment", "pmix", "hvdlm"), Path("/dev/shm")
    before = set(shared.glob("*"))
    with tempfile.TemporaryDirectory(prefix="hvdlm-") as name:
        with mock.patch.dict(os.environ, TMPDIR=name):
            yield

        def left() -> list[Path]:
            new = [path for path in set(shared.glob("*")) - before if path.name.startswith(known)]
            return [*Path(name).iterdir(), *(path for path in new if not mapped(path))]

        for _ in range(10):  # somebody else's may just be coming or going
            if not left():
                return
            time.sleep(0.5)
        raise Broken(f"left behind: {', '.join(map(str, left()))}")


def mapped(path: Path) -> bool:
    """Return whether a living process has the file in its memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def check_folder(folder: Path, whole: list[float], tolerance: float) -> None:
    """Check that a run's folder holds the whole curve, and nothing temporary."""
    found = losses(folder)
    apart = max((abs(a - b) for a, b in zip(found, whole, strict=True)), default=0.0)
    if apart > tolerance:
        raise Broken(f"losses are {apart:.3g} away from the undisturbed run's, allowed: {tolerance:g}")
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*")] + [p.name for p in folder.glob("flight_recorder")]
    if left:
        raise Broken(f"left behind in the run's folder: {', '.join(left)}")


def campaign(framework: str, length: int, blows: dict[Harm, int], seed: int) -> None:
    """Deal out so many blows of every kind over as many runs of ``length`` steps as it takes.

    Raises:
        Broken: something was lost, hung or left behind.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-chaos-") as name, nothing_stays():
        undisturbed = Path(name) / "undisturbed"
        disturbed(framework, undisturbed, length, kill, 0, random.Random(seed))
        whole, runs = losses(undisturbed), 0
        for harm, wanted in blows.items():
            chance, began, hits = random.Random(f"{framework} {harm.__name__} {seed}"), time.monotonic(), 0
            while hits < wanted:
                folder, runs = Path(name) / f"run-{runs}", runs + 1
                hits += disturbed(framework, folder, length, harm, wanted - hits, chance)
                check_folder(folder, whole, TOLERANCE[framework])
                spent = time.monotonic() - began
                print(f"{framework}, {harm.__name__}: {hits} hits, {runs} run(s) whole, {spent:.0f} s", flush=True)


def main() -> int:
    """Do the campaigns; return 1 where something was lost, hung or left behind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("frameworks", nargs="*", default=FRAMEWORKS)
    parser.add_argument("--kills", type=int, default=200, help="over all frameworks")
    parser.add_argument("--stops", type=int, default=50, help="over all frameworks")
    parser.add_argument("--steps", type=int, default=150, help="of a run")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"))
    o = parser.parse_args()
    frameworks = o.frameworks or FRAMEWORKS
    print(f"seed {o.seed}", flush=True)

    def share(blows: int) -> int:
        return -(-blows // len(frameworks))

    for framework in frameworks:
        try:
            campaign(framework, o.steps, {kill: share(o.kills), stop: share(o.stops)}, o.seed)
        except Broken as broken:
            print(f"{framework}: FAILED: {broken}", flush=True)
            return 1
    print(f"{o.kills} kills and {o.stops} stops: nothing lost, nothing hung, nothing left behind", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
