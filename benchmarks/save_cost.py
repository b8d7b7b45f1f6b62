"""Seconds for which training waits for a checkpoint: asynchronous saves beside synchronous ones.

    python benchmarks/save_cost.py [--parameters 100000000] [--rounds 7] [--ranks 1 4] [--folder FOLDER] [--short]

The state is that of AdamW: three float32 arrays per parameter, of which each rank holds an equal shard. Both ways take
turns; the copy that precedes the writing counts, and a turn's time is that of the slowest rank. The second figure is
the bytes in the files divided by those of the state: ranks of a sharded save write each byte once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Bar, emit, flags, make_parser, parse, report, report_ratio, run_worker

BAR, WHOLE = Bar(at_most=0.25), Bar(1, 1)
FULL = {"parameters": 100_000_000, "width": 1024, "rounds": 7, "ranks": [1, 4]}
SHORT = {"parameters": 2_000_000, "width": 256, "rounds": 2, "ranks": [1, 2]}
KINDS = ("parameters/{}", "optimizer/first/{}", "optimizer/second/{}")


def make_state(parameters: int, width: int, rank: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of ``rank`` of ``size``, and which shards of the global arrays they are, by name.

    A Transformer layer's 12 x width^2 parameters are one array, so that ``parameters`` is reached to half a layer.
    """
    import numpy as np

    from hvdlm.parallel.flat_layout import Shard

    shape = (12 * width, width)
    rows = shape[0] // size
    shard = Shard(shape, (rank * rows, 0), (rows, width))
    layers = max(1, round(parameters / (shape[0] * shape[1])))
    names = [kind.format(f"layers.{layer}") for layer in range(layers) for kind in KINDS]
    arrays = {name: np.random.default_rng(1).random(shard.held, np.float32) for name in names}
    return arrays, dict.fromkeys(names, shard)


def turn(saver: Any, world: Any, step: int, arrays: dict[str, Any], shards: dict[str, Any]) -> float:
    """Save once, asking every 10 ms for the end, as steps do; return the slowest rank's seconds of waiting."""
    world.gather_objects(0)
    began = time.perf_counter()
    saved = saver.start(step, {name: array.copy() for name, array in arrays.items()}, {}, shards, began)
    while saver.active:
        time.sleep(0.01)
        if not world.any(not saver.ready()):
            saved += saver.advance()
    return max(world.gather_objects(saved[0].blocked_seconds))


def work(o: argparse.Namespace) -> None:
    """Be a rank: save in turns; rank 0 emits the rounds and the bytes that all ranks hold and wrote."""
    from hvdlm.checkpoints.save import Saver
    from hvdlm.config import CheckpointConfig, Config
    from hvdlm_backends.connecting import connect_only

    config = Config()
    config.train.batch_size = 4
    world, _ = connect_only(config)
    arrays, shards = make_state(o.parameters, o.width, world.rank, world.size)
    savers = [Saver(o.folder, world, CheckpointConfig(keep=1, asynchronous=mode)) for mode in (True, False)]
    rounds = []
    for number in range(o.rounds + 1):  # the first isn't counted
        rounds.append([turn(saver, world, 2 * number + i, arrays, shards) for i, saver in enumerate(savers)])
    held = sum(world.gather_objects(sum(array.nbytes for array in arrays.values())))
    if world.rank == 0:
        files = list(o.folder.glob("step-*/*.safetensors"))
        emit("rounds", rounds[1:])
        emit("bytes", {"held": held, "written": sum(map(tensor_bytes, files)), "files": len(files)})
    world.close()


def tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def measure(o: argparse.Namespace, ranks: int) -> None:
    """Measure on ``ranks`` ranks."""
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        sizes = {"parameters": o.parameters, "width": o.width, "rounds": o.rounds, "folder": folder}
        values = run_worker("save_cost.py", ranks, ["--work", *flags(sizes)])
    count = values["bytes"][0]
    of = f"{count['held'] // 12:,} parameters, {ranks} rank(s)"
    report_ratio(f"seconds of waiting, asynchronous / synchronous save, {of}", values["rounds"][0], BAR)
    details = f"{count['written']:,} bytes in {count['files']} files"
    report(f"bytes written / bytes of the state, {of}", count["written"] / count["held"], WHOLE, details)


def main() -> int:
    """Measure on every number of ranks."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o)
        return 0
    for ranks in o.ranks:
        measure(o, ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
