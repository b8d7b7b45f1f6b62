"""The exponential moving average (EMA) of the parameters (``train.ema``; Polyak and Juditsky 1992).

After update number t (from 0), of a step that was applied::

    d = min(train.ema, (1 + t) / (10 + t))
    average = average + (1 - d) (parameters - average)

from the initial parameters, in float32. Early in a run, d is smaller than asked for, so that the average forgets the
initial values (as in TensorFlow's ExponentialMovingAverage and in diffusers). A rank averages what it updates: with
ZeRO its shard, with rounded parameters the float32 ones. A run that is resumed from a checkpoint without an average
starts it from the checkpoint's parameters.
"""

from __future__ import annotations

from hvdlm.errors import HvdlmError

KIND = "ema"
"""The average's name beside the optimizer's state: ``optimizer/ema/NAME`` in checkpoints."""

GATHERED = "ema"
"""The purpose of the collectives that gather the shards of an average, for an evaluation."""


def not_averaged(exchange: str) -> HvdlmError:
    """Return the error about ranks that have different parameters between the synchronisations of ``exchange``."""
    return HvdlmError(
        f"train.ema averages the parameters after every update, and ranks of {exchange} have different ones between "
        "synchronisations: leave it out, or --communication.exchange all_reduce."
    )


def decay_at(decay: float, step: int) -> float:
    """Return the decay of update number ``step`` (from 0)."""
    return min(decay, (1.0 + step) / (10.0 + step))
