r"""Runs on 2 ranks that are interrupted at random moments and restarted, compared with an undisturbed run.

    python benchmarks/chaos.py [torch tensorflow] [--kills 200] [--stops 50] [--branches 30] [--nans 30] [--flips 30] \
        [--two_runs 30] [--launcher_signals 30] [--steps 150] [--seed 1] [--short]

Every restart has to find a complete checkpoint, the losses have to equal those of the undisturbed run (torch: bit for
bit), and no process, temporary file or shared memory may remain. The exit code is 1 at the first violation. The kinds:

- kills: SIGKILL of a random rank at any moment, half of the time while a checkpoint is being written.
- stops: SIGTERM, SIGINT or SIGUSR1 to a random rank; the run has to save and exit with code 75.
- branches: killed runs resume from an earlier checkpoint, or from the one that was written last.
- nans, flips: a value of a random rank's parameters or optimizer becomes not finite, or a bit of it flips: no
  checkpoint may contain that.
- two_runs: a second run is started in the folder and has to be refused with code 2, then ranks of the first are killed.
- launcher_signals: Ctrl-C or SIGTERM to mpirun or horovodrun, which then kills its ranks; status.json has to be true.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import branches
import damage
from harness import Bar, flags, make_parser, parse, report
from interruptions import Attempt, Kind, Program, Violation, kill, losses, stop, wait_for, was_stopped
from launcher_signals import LAUNCHER_SIGNALS
from two_runs import TWO_RUNS

from hvdlm.checkpoints import load
from hvdlm.checkpoints.discovery import step_folders
from hvdlm.io.atomic_files import sha256

KINDS = {
    "kills": Kind(kill, count=200),
    "stops": Kind(stop, count=50, ended=was_stopped),
    "branches": branches.BRANCH,
    "nans": damage.NAN,
    "flips": damage.FLIP,
    "two_runs": TWO_RUNS,
    "launcher_signals": LAUNCHER_SIGNALS,
}
"""Kinds of interruptions, by the option that sets how many there are, of all frameworks together."""
FULL = {name: kind.count for name, kind in KINDS.items()} | {"steps": 150, "layers": 2}
SHORT = dict.fromkeys(KINDS, 1) | {"steps": 45, "layers": 1}
NONE = Bar(at_most=0)
SEGMENTS = ["OMPI_MCA_btl_vader_backing_directory", "OMPI_MCA_btl_sm_backing_directory"]
"""Where Open MPI 4 and 5 keep the memory that ranks share."""
TOLERANCE = {"torch": 0.0, "tensorflow": 1e-5}


def check_checkpoints(folder: Path, newest: int) -> None:
    """Verify the files of all checkpoints, and that the newest is of step ``newest`` or later."""
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


class ShortPauses(random.Random):
    """Random numbers of the short form, whose steps are fewer: ``uniform``, of which all pauses are, gives less."""

    def uniform(self, a: float, b: float) -> float:
        """Return a number between 0.3 a and 0.3 b."""
        return 0.3 * super().uniform(a, b)


def run_interrupted(
    framework: str, folder: Path, size: Sequence[str], kind: Kind, limit: int, chance: random.Random
) -> int:
    """Train to the end with ``limit`` interruptions at most; return how many there were."""
    hits, resume = 0, None
    while True:
        interrupted = hits < limit
        program = kind.program(chance) if interrupted else Program()
        attempt = Attempt(framework, folder, size, program, resume)
        if interrupted:
            kind.interrupt(attempt, chance)
        else:
            wait_for(attempt, lambda: False, 300)
        code = attempt.wait()
        check_checkpoints(folder, attempt.first_step)
        hit = interrupted and kind.ended(attempt, code)
        hits += hit
        if code and not hit:
            raise Violation(f"an undisturbed launch exited with code {code}: {attempt.errors()}")
        if code == 0 and not hit:
            return hits
        resume = kind.resume(folder, chance) if hits < limit else None


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Give launches temporary folders of their own, on disk and in shared memory; check afterwards that they are empty.

    Names in shared memory don't tell the runs of a machine apart, so that Open MPI is given a folder for its segments.
    """
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="hvdlm-") as temporary,
        tempfile.TemporaryDirectory(prefix="hvdlm-", dir=shared) as segments,
    ):
        with mock.patch.dict(os.environ, {"TMPDIR": temporary, **dict.fromkeys(SEGMENTS, segments)}):
            yield
        for _ in range(10):  # launchers may be deleting files just now
            left = [str(path) for name in (temporary, segments) for path in Path(name).iterdir()]
            if not left:
                return
            time.sleep(0.5)
        raise Violation(f"left behind: {', '.join(left)}")


def check_leftovers(folder: Path) -> None:
    """Check that the folder of a run that has ended holds nothing temporary."""
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*")] + [p.name for p in folder.glob("flight_recorder")]
    if left:
        raise Violation(f"left behind in the run's folder: {', '.join(left)}")


def campaign(
    framework: str, size: Sequence[str], counts: Mapping[str, int], seed: int, numbers: type[random.Random]
) -> None:
    """Interrupt runs, as many as it takes for these counts of interruptions by kind; ``size``: options of each run.

    ``numbers``: the generator of all random choices.

    Raises:
        Violation: something was lost, hung or left behind.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-chaos-") as name, nothing_left_behind():
        undisturbed = Path(name) / "undisturbed"
        run_interrupted(framework, undisturbed, size, KINDS["kills"], 0, numbers(seed))
        expected, runs = losses(undisturbed), 0
        for kind, count in counts.items():
            chance, began, hits = numbers(f"{framework} {kind} {seed}"), time.monotonic(), 0
            while hits < count:
                folder = Path(name) / f"run-{runs}"
                runs += 1
                hits += run_interrupted(framework, folder, size, KINDS[kind], count - hits, chance)
                KINDS[kind].check(folder, expected, TOLERANCE[framework])
                check_leftovers(folder)
                seconds = time.monotonic() - began
                print(f"{framework}, {kind}: {hits} of {count} in {runs} run(s), {seconds:.0f} s", flush=True)


def share(totals: Mapping[str, int], number: int, frameworks: int) -> dict[str, int]:
    """Return the counts by kind of one of several frameworks, which take turns in having one more."""
    return {
        kind: total // frameworks + ((index + number) % frameworks < total % frameworks)
        for index, (kind, total) in enumerate(totals.items())
    }


def words(counts: Mapping[str, int]) -> str:
    """Return counts by kind as text."""
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count)


def main() -> int:
    """Interrupt runs of each framework; return 1 at the first violation."""
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"), help="default: random")
    o = parse(parser, FULL, SHORT)
    print(f"seed {o.seed}", flush=True)
    totals = {kind: getattr(o, kind) for kind in KINDS}
    for number, framework in enumerate(o.frameworks):
        counts = share(totals, number, len(o.frameworks))
        numbers = ShortPauses if o.short else random.Random
        title = f"violations after {words(counts)}, {framework}"
        try:
            campaign(framework, flags({"train.steps": o.steps, "model.layers": o.layers}), counts, o.seed, numbers)
        except Violation as violation:
            report(title, 1, NONE)
            print(f"{framework}: FAILED: {violation}", flush=True)
            return 1
        report(title, 0, NONE)
    print(f"{words(totals)}: nothing lost, nothing hung, nothing left behind", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
