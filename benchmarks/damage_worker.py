"""``python -m hvdlm`` in which one value of one rank's state is damaged once, as the JSON in ``HVDLM_DAMAGE`` says.

``rank``; ``after``: steps after the start; ``what``: parameters or optimizer; ``position``: share of the vector, from 0
to 1; ``how``: nan, inf, or the number of the bit that flips. A file ``damaged`` in the run's folder shows that it
happened.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from hvdlm import cli
from hvdlm.training import loop

DAMAGE = json.loads(os.environ["HVDLM_DAMAGE"])
do_step = loop.do_step


def damaging_step(run: Any, step: int, *rest: Any) -> Any:
    """Do the step, and damage the state after the chosen one."""
    result = do_step(run, step, *rest)
    if run.world.rank == DAMAGE["rank"] and step + 1 == run.start_step + DAMAGE["after"]:
        DAMAGE["rank"] = None  # a rollback doesn't repeat it
        damage(run.trainable)
        (run.folder / "damaged").write_text(f"{step + 1}\n")
    return result


def damage(trainable: Any) -> None:
    """Change one value of the parameters, or of the optimizer's first vector, in either framework."""
    vectors = {"parameters": trainable._flat, "optimizer": next(iter(trainable._optimizer.state.values()))}
    target = vectors[DAMAGE["what"]]
    values = np.array(target.cpu() if hasattr(target, "cpu") else target.numpy())
    element = int(DAMAGE["position"] * (len(values) - 1))
    if isinstance(DAMAGE["how"], int):
        values.view(np.uint32)[element] ^= np.uint32(1 << DAMAGE["how"])
    else:
        values[element] = float(DAMAGE["how"])
    if hasattr(target, "assign"):
        target.assign(values)
    else:
        import torch

        target.copy_(torch.from_numpy(values))


loop.do_step = damaging_step
sys.exit(cli.main())
