"""Exact sums (``communication.reduction exact``): their bits on 1, 2, 4 and 8 ranks, and their time on 2 ranks.

    python benchmarks/exact_sums.py [torch tensorflow] [--short]

Bits: a small GPT trains on each number of ranks, threads of one process; every loss and every array of the checkpoint
is compared with one rank's. Time: on 2 ranks with one thread each, exact sums, plain sums with micro-batches of the
same rows (a leaf), and plain sums of whole batches live in the same processes and take turns, a block of steps each.
The last figure is what computing leaf by leaf costs by itself, without exact sums.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gpt_on_ranks import VOCAB, build_gpt
from harness import Bar, emit, environment, flags, make_parser, parse, report, report_ratio, run_worker

TIME = Bar(at_most=1.15)
BLOCK = 3  # steps of a turn
FULL = {
    "steps": 500, "ranks": [1, 2, 4, 8], "layers": 6, "width": 384, "context": 64, "rows": 32, "leaf": 4, "rounds": 10,
    "backend": "mpi",
}  # fmt: skip
SHORT = {"steps": 4, "ranks": [1, 2], "layers": 1, "width": 48, "rows": 8, "leaf": 2, "rounds": 2}
KINDS = ("exact", "leaves", "whole")

Times = tuple[float, float]
"""(seconds of the slower rank, processor seconds of all ranks) of a block."""


class Training:
    """A model that trains with sums of one of ``KINDS``."""

    def __init__(self, kind: str, o: argparse.Namespace) -> None:
        leaf = None if kind == "whole" else o.leaf
        reduction: Literal["exact", "average"] = "exact" if kind == "exact" else "average"
        self.world, self.trainable = build_gpt(o.backend, o, leaf, reduction)
        self._rows = leaf or o.rows // self.world.size
        self._step = 0

    def block(self, batch: Any) -> tuple[float, float]:
        """Do a block of steps on ``batch``, this rank's; return its seconds and its processor seconds."""
        count = len(batch.inputs)
        micro_batches = [batch.rows(start, start + self._rows) for start in range(0, count, self._rows)]
        began, computed = time.perf_counter(), time.process_time()
        for _ in range(BLOCK):
            float(self.trainable.train_step(micro_batches, 1e-4, self._step).loss)
            self._step += 1
        return time.perf_counter() - began, time.process_time() - computed


def work(o: argparse.Namespace) -> None:
    """Be a rank: let all kinds train in turns; rank 0 emits the rounds."""
    from hvdlm.protocols.types import Batch

    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    trainings = {kind: Training(kind, o) for kind in KINDS}
    world = trainings["exact"].world
    shape = (o.rows // world.size, o.context + 1)
    tokens = np.random.default_rng(world.rank).integers(0, VOCAB, shape).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    rounds = []
    for number in range(o.rounds + 1):
        seconds = {}
        for kind in KINDS if number % 2 else KINDS[::-1]:
            world.gather_objects(0)
            elapsed, computed = zip(*world.gather_objects(trainings[kind].block(batch)), strict=True)
            seconds[kind] = max(elapsed), sum(computed)
        rounds.append([seconds[kind] for kind in KINDS])
    if world.rank == 0:
        emit("rounds", rounds[1:])
    for training in reversed(trainings.values()):
        training.world.close()


def train(framework: str, ranks: int, steps: int, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train on ``ranks`` ranks; return the losses of all steps and the arrays of the last checkpoint."""
    from hvdlm.checkpoints.discovery import find
    from hvdlm.parallel.flat_layout import whole

    options = {
        "framework": framework, "log.run": folder, "log.every": 1, "log.tensorboard": "false", "train.steps": steps,
        "train.batch_size": 16, "train.warmup": 5, "communication.reduction": "exact", "communication.exact_rows": 2,
        "model.layers": 2, "model.width": 32, "model.heads": 2, "model.dropout": 0.1, "data.context": 32,
    }  # fmt: skip
    command = [sys.executable, "-m", "hvdlm", *flags(options)]
    command += ["--backend", "threads", "--ranks", str(ranks)] if ranks > 1 else []
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3600)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = find(folder, "auto")
    assert checkpoint is not None
    reader, tensors = checkpoint.reader(), checkpoint.tensors
    arrays = {name: reader.read(name, whole(stored[0].shard.shape)) for name, stored in tensors.items()}
    figures = [line[key] for line in lines for key in ("loss", "val_loss") if key in line]
    return figures, arrays


def compare(framework: str, steps: int, ranks: list[int]) -> None:
    """Report how many losses and arrays of runs on several numbers of ranks differ from one rank's."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {count: train(framework, count, steps, Path(folder) / str(count)) for count in ranks}
    (losses, arrays), *others = runs.values()
    other_losses = sum(a != b for other, _ in others for a, b in zip(losses, other, strict=True))
    other_arrays = sum(other[name].tobytes() != a.tobytes() for _, other in others for name, a in arrays.items())
    names = f"{', '.join(map(str, ranks))} ranks"
    none = Bar(at_most=0)
    title = f"{steps} steps on {names}, {framework}"
    report(f"losses with other bits, {title}", other_losses, none, f"{len(losses)} losses, validation included")
    report(f"arrays with other bits, {title}", other_arrays, none, f"{len(arrays)} arrays of a checkpoint")


def report_times(title: str, first: Sequence[Times], second: Sequence[Times], bar: Bar | None) -> None:
    """Report the ratio of the seconds of two kinds; the details have that of their processor seconds."""
    computed = statistics.median(a[1] / b[1] for a, b in zip(first, second, strict=True))
    rounds = [(a[0], b[0]) for a, b in zip(first, second, strict=True)]
    report_ratio(title, rounds, bar, f"{computed:.3f} of the processor seconds of all ranks")


def main() -> int:
    """Compare and measure each framework."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o)
        return 0
    sizes = {name: getattr(o, name) for name in FULL if name != "ranks"}
    for framework in o.frameworks:
        compare(framework, o.steps, o.ranks)
        rounds = run_worker("exact_sums.py", 2, ["--work", framework, *flags(sizes)])["rounds"][0]
        exact, leaves, whole = zip(*rounds, strict=True)
        title = f"step with exact sums / with plain sums of the same leaves, 2 ranks, {framework}"
        report_times(title, exact, leaves, TIME)
        title = f"plain step in leaves of {o.leaf} sequences / of {o.rows // 2} at once, 2 ranks, {framework}"
        report_times(title, leaves, whole, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
