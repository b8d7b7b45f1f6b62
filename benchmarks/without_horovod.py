"""Training speed of backend ``mpi4py`` beside backend ``mpi`` (Horovod); 2 ranks, one thread each.

    python benchmarks/without_horovod.py [torch tensorflow] [--short]

The figure is tokens per second over mpi4py divided by those over Horovod. Both backends live in the same processes and
train a GPT of 10.7 million parameters, a block of steps each in turns. The details say which share of its
communication each hid behind the backward pass, and how far their losses differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from gpt_on_ranks import VOCAB, build_gpt
from harness import Bar, emit, flags, make_parser, parse, report_ratio, run_worker

BAR = Bar(at_least=0.95)
BLOCK = 3  # steps of a turn
BACKENDS = ("mpi", "mpi4py")
FULL = {"layers": 6, "width": 384, "context": 64, "rows": 16, "rounds": 10}
SHORT = {"layers": 1, "width": 48, "rows": 4, "rounds": 2}


class Training:
    """A model that trains over one backend."""

    def __init__(self, backend_name: str, o: argparse.Namespace) -> None:
        self.world, self.trainable = build_gpt(backend_name, o)
        self.step = 0
        self.waited = 0.0
        self.losses: list[float] = []

    def block(self, batch: Any) -> float:
        """Do a block of steps; return its seconds."""
        began = time.perf_counter()
        for _ in range(BLOCK):
            result = self.trainable.train_step([batch], 1e-4, self.step)
            self.step += 1
            self.waited += result.comm_seconds
            self.losses.append(result.loss)
        return time.perf_counter() - began

    def hidden(self) -> float | None:
        """Return the share of the seconds in collectives for which no step waited; None where they aren't known."""
        busy = self.world.transfer_seconds()
        return None if not busy else max(0.0, 1.0 - self.waited / busy)


def work(o: argparse.Namespace) -> None:
    """Be a rank: let both backends train in turns; rank 0 emits the rounds."""
    import numpy as np

    from hvdlm.protocols.types import Batch

    # What backend mpi4py sets for TensorFlow; TensorFlow starts once, so that it is set for both.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    horovod, mpi4py = both = [Training(name, o) for name in BACKENDS]
    world = horovod.world
    shape = (o.rows // world.size, o.context + 1)
    tokens = np.random.default_rng(world.rank).integers(0, VOCAB, shape).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)

    def turn(training: Training) -> float:
        """Return the seconds of a block on the slower rank."""
        world.gather_objects(0)
        return max(world.gather_objects(training.block(batch)))

    rounds = []
    for number in range(o.rounds + 1):
        seconds = {training: turn(training) for training in (both if number % 2 else both[::-1])}
        rounds.append((seconds[horovod], seconds[mpi4py]))
    if world.rank == 0:
        emit("rounds", rounds[1:])
        emit("hidden", [training.hidden() for training in both])
        emit("losses", [training.losses for training in both])
    for training in reversed(both):
        training.world.close()


def main() -> int:
    """Measure each framework."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o)
        return 0
    sizes = {name: getattr(o, name) for name in FULL}
    for framework in o.frameworks:
        values = run_worker("without_horovod.py", 2, ["--work", framework, *flags(sizes)])
        hidden = [
            f"{name} hid {'an unknown share' if share is None else f'{share:.0%}'}"
            for name, share in zip(BACKENDS, values["hidden"][0], strict=True)
        ]
        difference = max(abs(a - b) for a, b in zip(*values["losses"][0], strict=True))
        details = f"{', '.join(hidden)} of its communication; losses differ by {difference:.1e} at most"
        report_ratio(f"tokens/s over mpi4py / over Horovod, {framework}", values["rounds"][0], BAR, details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
