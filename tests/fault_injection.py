"""``python -m hvdlm`` with faults injected at chosen steps, as the JSON in ``HVDLM_TEST_FAULTS`` says.

- ``rows``: path; rank r appends a line (row of the step, first row, last row, CRC-32 of the inputs) a step to PATH.r.
- ``comparisons``: path; rank r appends a line (step, number of fingerprints) to PATH.r at every check of replicas.
- ``signals``: [[rank, step, name], ...]; signals that a rank sends itself at the end of a step.
- ``nohup``: whether SIGHUP is ignored; the test's own process may ignore it, too.
- ``late``: [rank, step, name, seconds]; a signal that many seconds after the end of a step.
- ``sleep``: [rank, step, seconds]; the rank sleeps at the end of a step.
- ``nan``: [batch, ...]; the losses of these batches are no numbers on rank 1 (on rank 0 of a single-rank run).
- ``damage``: [[rank, step, what, how], ...]; a value of the rank's state changes at the end of a step, the first time
  that the run comes to it: ``flip`` (one bit), ``nan`` or ``inf``. ``what``: parameters, optimizer, frozen (a base
  weight), velocity or anchor (of DiLoCo), or a part of a parameter's name.
- ``again``: true; the state is damaged whenever the run comes to that step.
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
from hvdlm.training.batches import Batches

FAULTS = json.loads(os.environ["HVDLM_TEST_FAULTS"])
do_step, take, check_replicas = loop.do_step, Batches.take, loop.check_replicas


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
    for fault in [fault for fault in FAULTS.get("damage", []) if fault[:2] == here]:
        damage(run.trainable, *fault[2:])
        if not FAULTS.get("again"):
            FAULTS["damage"].remove(fault)
    return result


def damage(trainable: Any, what: str, how: str) -> None:
    """Change one value of the trainable's state, in either framework."""
    element = 100
    if what == "frozen":
        weights = trainable._adapters._frozen
        name = next(name for name, tensor in weights.items() if len(tensor.shape) == 2)
        values = damaged(weights[name], element, how)
        if hasattr(weights[name], "copy_"):
            return store(weights[name], values)
        import tensorflow as tf

        weights[name] = tf.constant(values)
        return None
    if what == "optimizer":
        target = list(trainable._optimizer.state.values())[-1]
    elif what in ("velocity", "anchor"):
        target = getattr(trainable._exchange, f"_{what}")
    else:
        target = trainable._flat
        if what != "parameters":
            element = next(slot.start for slot in trainable.layout.slots if what in slot.name)
    return store(target, damaged(target, element, how))


def damaged(tensor: Any, element: int, how: str) -> np.ndarray:
    values = np.array((tensor.detach() if hasattr(tensor, "detach") else tensor).numpy())
    if how == "flip":
        values.reshape(-1).view(np.int32)[element] ^= 1 << 20
    else:
        values.reshape(-1)[element] = float(how)
    return values


def store(target: Any, values: np.ndarray) -> None:
    if hasattr(target, "assign"):
        target.assign(values)
    else:
        import torch

        target.copy_(torch.from_numpy(values))


def faulty_batches(self: Batches, row: int, left: int) -> Any:
    run, batches = self._run, take(self, row, left)
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
loop.do_step, Batches.take = faulty_step, faulty_batches  # type: ignore[method-assign]
if FAULTS.get("pending"):  # figures are read a step later, as on a GPU
    from hvdlm_torch import figures

    figures.ON_HOST = ()
if "comparisons" in FAULTS:
    loop.check_replicas = recorded_check
sys.exit(cli.main())
