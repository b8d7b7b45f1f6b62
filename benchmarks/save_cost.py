"""How long training stands still for a checkpoint: asynchronous saves against synchronous ones, in turns.

python benchmarks/save_cost.py [--parameters 100000000] [--rounds 7] [--ranks 1 4] [--folder FOLDER]

The state is that of AdamW, three arrays of float32 per parameter, of which ranks hold equal parts; the copy that comes
before the writing counts. Of every round the slowest rank counts. Returns 1 where the median ratio is above 0.25, or
where the ranks of a sharded save don't write each byte once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pairing import command, environment, parse_rounds, report

BAR = 0.25
WIDTH = 1024
LAYER = (12 * WIDTH, WIDTH)  # a Transformer layer's matrices, 12 x width^2
KINDS = ("parameters/{}", "optimizer/first/{}", "optimizer/second/{}")


def options(arguments: list[str]) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--work", action="store_true")
    return parser.parse_args(arguments)


def parts(parameters: int, rank: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of which a rank of ``size`` holds the rows, and which pieces they are, by global name."""
    import numpy as np

    from hvdlm.parallel.flat_layout import Shard

    rows = LAYER[0] // size
    shard = Shard(LAYER, (rank * rows, 0), (rows, WIDTH))
    layers = max(1, round(parameters / (LAYER[0] * LAYER[1])))
    names = [kind.format(f"layers.{layer}") for layer in range(layers) for kind in KINDS]
    return {name: np.random.default_rng(1).random(shard.held, np.float32) for name in names}, dict.fromkeys(
        names, shard
    )


def turn(saver: Any, world: Any, step: int, arrays: dict[str, Any], shards: dict[str, Any]) -> float:
    """Save once, looking every few milliseconds whether it goes on, as steps do; return the slowest rank's seconds."""
    world.gather_objects(0)
    began = time.perf_counter()
    done = saver.start(step, {name: array.copy() for name, array in arrays.items()}, {}, shards, began)
    while saver.active:
        time.sleep(0.01)
        if not world.any(not saver.ready()):
            done += saver.advance()
    return max(world.gather_objects(done[0].blocked_seconds))


def work(o: argparse.Namespace) -> None:
    """Be one rank: save in turns, print rank 0's rounds and the bytes that all ranks wrote."""
    from hvdlm.checkpoints.save import Saver
    from hvdlm.config import CheckpointConfig, Config
    from hvdlm.training.run import meet

    config = Config()
    config.train.batch_size = 4
    world = meet(config).world
    arrays, shards = parts(o.parameters, world.rank, world.size)
    savers = [Saver(o.folder, world, CheckpointConfig(keep=1, asynchronous=mode)) for mode in (True, False)]
    rounds = []
    for number in range(o.rounds + 1):  # the first isn't counted
        rounds.append([turn(saver, world, 2 * number + i, arrays, shards) for i, saver in enumerate(savers)])
    held = sum(world.gather_objects(sum(array.nbytes for array in arrays.values())))
    if world.rank == 0:
        files = list(o.folder.glob("step-*/*.safetensors"))
        print("ROUNDS", json.dumps(rounds[1:]), flush=True)
        print("BYTES", json.dumps([held, sum(map(numbers, files)), len(files)]), flush=True)
    world.close()


def numbers(path: Path) -> int:
    """Return the bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def measure(o: argparse.Namespace, ranks: int) -> bool:
    """Measure on ``ranks`` ranks; return whether all is as it should be."""
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        sizes = ["--parameters", str(o.parameters), "--rounds", str(o.rounds), "--folder", folder]
        worker = command("save_cost.py", ranks, "--work", *sizes)
        done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=1800)
    title = f"asynchronous against synchronous save, {o.parameters:,} parameters, {ranks} rank(s), seconds stood still"
    median = report(title, parse_rounds(done)[0])
    line = next(line for line in done.stdout.splitlines() if line.startswith("BYTES "))
    held, written, files = json.loads(line.removeprefix("BYTES "))
    print(f"{ranks} rank(s) hold {held:,} bytes and wrote {written:,} into {files} files", flush=True)
    return median <= BAR and held == written


def main() -> int:
    """Measure on every number of ranks; return 1 where it is above the bar."""
    o = options(sys.argv[1:])
    if o.work:
        work(o)
        return 0
    good = [measure(o, ranks) for ranks in o.ranks]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
