"""``python -m hvdlm`` with something done to it at a chosen moment; ``HVDLM_TEST_DISTURB`` says what, as JSON.

``rows``: a file to which every rank writes which rows it reads, a line (step, row, first, last, CRC-32) a step;
``signals``: [[rank, step, name], ...] that a rank sends itself once that step is done; ``nan``: batches in whose losses
rank 1 (rank 0 where it is alone) finds no number; ``flip``: [rank, step]: a bit of its parameters flips; ``late``:
[rank, step, name, seconds]: another signal, that much later; ``sleep``: [rank, step, seconds].
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import zlib
from typing import Any

import numpy as np

from hvdlm import cli
from hvdlm.training import loop

WHAT = json.loads(os.environ["HVDLM_TEST_DISTURB"])
do_step, micro_batches = loop.do_step, loop.micro_batches


def disturbed_step(run: Any, step: int, *rest: Any) -> Any:
    result = do_step(run, step, *rest)
    for rank, when, name in WHAT.get("signals", []):
        if rank == run.world.rank and when == step + 1:
            os.kill(os.getpid(), getattr(signal, name))
    if WHAT.get("late", [])[:2] == [run.world.rank, step + 1]:
        _, _, name, seconds = WHAT["late"]
        threading.Timer(seconds, lambda: os.kill(os.getpid(), getattr(signal, name))).start()
    if WHAT.get("sleep", [])[:2] == [run.world.rank, step + 1]:
        time.sleep(WHAT["sleep"][2])
    if WHAT.get("flip") == [run.world.rank, step + 1]:
        flip(run.trainable._flat)
    return result


def flip(flat: Any) -> None:
    """Flip a bit of the flat parameters' element 100, in either framework."""
    values = np.array(flat.cpu() if hasattr(flat, "cpu") else flat.numpy())
    values.view(np.int32)[100] ^= 1 << 20
    if hasattr(flat, "assign"):
        flat.assign(values)
    else:
        import torch

        flat.copy_(torch.from_numpy(values))


def disturbed_batches(run: Any, row: int) -> Any:
    parts = micro_batches(run, row)
    if "rows" in WHAT:
        crc = zlib.crc32(b"".join(part.inputs.tobytes() for part in parts))
        with open(f"{WHAT['rows']}.{run.world.rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([row, *run.rows, crc]) + "\n")
    if "nan" in WHAT and run.world.rank == min(1, run.world.size - 1):
        for part in parts:
            bad = run.cursor.place(row)[0] in WHAT["nan"]
            part.weights = np.full(part.inputs.shape, np.nan if bad else 1.0, np.float32)
    return parts


loop.do_step, loop.micro_batches = disturbed_step, disturbed_batches
sys.exit(cli.main())
