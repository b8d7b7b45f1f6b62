"""``python -m hvdlm`` with faults injected at chosen steps, as the JSON in ``HVDLM_TEST_FAULTS`` says.

- ``rows``: path; rank r appends a line (row of the step, first row, last row, CRC-32 of the inputs) a step to PATH.r.
- ``comparisons``: path; rank r appends a line (step, number of fingerprints) to PATH.r at every check of replicas.
- ``signals``: [[rank, step, name], ...]; signals that a rank sends itself at the end of a step.
- ``nohup``: whether SIGHUP is ignored; the test's own process may ignore it, too.
- ``late``: [rank, step, name, seconds]; a signal that many seconds after the end of a step.
- ``sleep``: [rank, step, seconds]; the rank sleeps at the end of a step.
- ``nan``: [batch, ...]; the losses of these batches are no numbers on rank 1 (on rank 0 of a single-rank run).
- ``flip``: [rank, step]; one bit of the rank's parameters flips at the end of a step.
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

FAULTS = json.loads(os.environ["HVDLM_TEST_FAULTS"])
do_step, micro_batches, check_replicas = loop.do_step, loop.micro_batches, loop.check_replicas


def append_line(path: str, rank: int, values: list[Any]) -> None:
    with open(f"{path}.{rank}", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def faulty_step(run: Any, step: int, *rest: Any) -> Any:
    result = do_step(run, step, *rest)
    here = [run.world.rank, step + 1]
    for rank, when, name in FAULTS.get("signals", []):
        if [rank, when] == here:
            os.kill(os.getpid(), getattr(signal, name))
    if FAULTS.get("late", [])[:2] == here:
        _, _, name, seconds = FAULTS["late"]
        threading.Timer(seconds, lambda: os.kill(os.getpid(), getattr(signal, name))).start()
    if FAULTS.get("sleep", [])[:2] == here:
        time.sleep(FAULTS["sleep"][2])
    if FAULTS.get("flip") == here:
        flip_bit(run.trainable._flat)
    return result


def flip_bit(flat: Any) -> None:
    """Flip a bit of element 100 of the flat parameters, in either framework."""
    values = np.array(flat.cpu() if hasattr(flat, "cpu") else flat.numpy())
    values.view(np.int32)[100] ^= 1 << 20
    if hasattr(flat, "assign"):
        flat.assign(values)
    else:
        import torch

        flat.copy_(torch.from_numpy(values))


def faulty_batches(run: Any, row: int) -> Any:
    batches = micro_batches(run, row)
    if "rows" in FAULTS:
        crc = zlib.crc32(b"".join(batch.inputs.tobytes() for batch in batches))
        append_line(FAULTS["rows"], run.world.rank, [row, *run.rows, crc])
    if "nan" in FAULTS and run.world.rank == min(1, run.world.size - 1):
        for batch in batches:
            weight = np.nan if run.cursor.batch_number(row) in FAULTS["nan"] else 1.0
            batch.weights = np.full(batch.inputs.shape, weight, np.float32)
    return batches


def recorded_check(run: Any, step: int) -> None:
    append_line(FAULTS["comparisons"], run.world.rank, [step, len(run.trainable.fingerprints())])
    check_replicas(run, step)


signal.signal(signal.SIGHUP, signal.SIG_IGN if FAULTS.get("nohup") else signal.SIG_DFL)
loop.do_step, loop.micro_batches = faulty_step, faulty_batches
if "comparisons" in FAULTS:
    loop.check_replicas = recorded_check
sys.exit(cli.main())
