"""Training speed of backend ``mpi4py`` against ``mpi`` (Horovod), on the same 2 ranks in turns, one thread each.

python benchmarks/without_horovod.py [torch tensorflow] [--layers 6 --width 384 --context 64 --rows 16 --rounds 20]

Both worlds live in the same processes, and train the same model of 10.7 million parameters, a block of steps each. The
ratio is that of tokens per second, mpi4py's to mpi's; beside it stands how much of its communication each hid behind
the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from pairing import FRAMEWORKS, command, environment, parse_rounds, report

BAR = 0.95
BLOCK = 3  # steps of a turn
BACKENDS = ("mpi", "mpi4py")
SIZES = {"layers": 6, "width": 384, "context": 64, "rows": 16, "rounds": 20}
VOCAB = 96


class Trained:
    """A model that trains over one backend."""

    def __init__(self, backend: str, o: argparse.Namespace) -> None:
        from hvdlm import plugins
        from hvdlm.config import Config, ModelConfig
        from hvdlm.models.spec import builtin_models
        from hvdlm.parallel.mesh import make_mesh

        config = Config(framework=o.framework, backend=backend)
        config.model = ModelConfig(layers=o.layers, width=o.width, heads=6, bias=False)
        config.data.context, config.train.batch_size, config.train.threads = o.context, o.rows, 1
        manager = plugins.load([o.framework, backend, "all_reduce"])
        made = plugins.make(manager, "backend", backend)
        made.prepare(config)
        manager.hook.hvdlm_prepare(config=config)
        framework = plugins.make(manager, "framework", o.framework)
        mesh = make_mesh(made.launch_shape()[1], config.parallel)
        self.world = made.start(framework, mesh.groups(), config)
        group = self.world.group(mesh.group("data", self.world.rank))
        more: dict[str, Any] = {"compressors": {}, "index": self.world.rank}
        exchange = plugins.make(manager, "exchange", "all_reduce", group=group, config=config, **more)
        spec = builtin_models()["gpt"](config.model, VOCAB, o.context)
        self.trainable = framework.build(spec, mesh, self.world, exchange, config)
        self.step, self.waited, self.losses = 0, 0.0, []

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
        """Return the share of the seconds in collectives that no step stood still for."""
        busy = self.world.transfer_seconds()
        return None if not busy else max(0.0, 1.0 - self.waited / busy)


def work(o: argparse.Namespace) -> None:
    """Be one rank: let both backends train in turns; rank 0 prints."""
    import numpy as np

    from hvdlm.protocols.types import Batch

    # What mpi4py sets for TensorFlow, for both: the first of them to prepare would decide.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    both = [Trained(backend, o) for backend in BACKENDS]
    world = both[0].world
    tokens = (
        np.random.default_rng(world.rank).integers(0, VOCAB, (o.rows // world.size, o.context + 1)).astype(np.int32)
    )
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    rounds = []
    for number in range(o.rounds + 1):
        seconds = {}
        for trained in both if number % 2 else reversed(both):
            world.gather_objects(0)
            seconds[id(trained)] = max(world.gather_objects(trained.block(batch)))
        rounds.append([seconds[id(trained)] for trained in both])
    if world.rank == 0:
        print("ROUNDS", json.dumps(rounds[1:]), flush=True)
        figures = {"hidden": [trained.hidden() for trained in both], "losses": [trained.losses for trained in both]}
        print("FIGURES", json.dumps(figures), flush=True)
    for trained in reversed(both):
        trained.world.close()


def main() -> int:
    """Measure; return 1 where mpi4py is below its bar in a framework."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="*", default=FRAMEWORKS)
    parser.add_argument("--framework", help=argparse.SUPPRESS)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    if o.framework:
        work(o)
        return 0
    good = True
    for framework in o.frameworks:
        options = [part for name in SIZES for part in (f"--{name}", str(getattr(o, name)))]
        worker = command("without_horovod.py", 2, "--framework", framework, *options)
        done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=1800)
        ratio = report(f"tokens/s of mpi4py to mpi, {framework}", parse_rounds(done)[0])
        figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FIGURES "))[8:])
        shares = ", ".join(
            f"{name} {'unknown' if share is None else f'{share:.0%}'}"
            for name, share in zip(BACKENDS, figures["hidden"], strict=True)
        )
        apart = max(abs(a - b) for a, b in zip(*figures["losses"], strict=True))
        steps = len(figures["losses"][0])
        print(f"  communication hidden: {shares}; losses differ by {apart:.1e} at most in {steps} steps")
        good &= ratio >= BAR
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
