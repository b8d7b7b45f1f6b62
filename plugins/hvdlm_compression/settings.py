"""What can be wrong in the settings of compression and rarer synchronisation: each answer is one sentence."""

from __future__ import annotations

import math

from hvdlm.config import CommunicationConfig, Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec


def outer(options: CommunicationConfig, name: str) -> tuple[float, float]:
    """Return the outer optimizer's (learning rate, momentum) of an exchange.

    DiLoCo's paper has 8 ranks and momentum 0.9; with 2 ranks their mean differences are larger, and 0.8 ends lower
    (docs/compression.md).
    """
    rate, momentum = (0.7, 0.8) if name == "diloco" else (1.0, 0.0)
    chosen = options.local
    return (
        rate if chosen.outer_learning_rate is None else chosen.outer_learning_rate,
        momentum if chosen.outer_momentum is None else chosen.outer_momentum,
    )


def check_compression(config: Config, spec: ModelSpec) -> None:
    """Refuse what doesn't fit together.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    chosen = config.communication.compression
    _whole_gradients(config, f"compression {chosen.algorithm}")
    if chosen.algorithm == "power_sgd":
        _rank(chosen.rank, spec)
    if chosen.algorithm == "dgc" and chosen.momentum and config.train.momentum:
        raise HvdlmError(
            "communication.compression.momentum takes the place of train.momentum, both would count it twice: "
            "set --train.momentum 0."
        )


def check_rounds(config: Config) -> None:
    """Refuse evaluations and checkpoints where ranks differ.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    every, name = config.communication.local.steps, config.communication.exchange
    _whole_gradients(config, name)
    for key, value in (("train.eval_every", config.train.eval_every), ("checkpoint.every", config.checkpoint.every)):
        if value % every:
            nearest = max(every, round(value / every) * every)
            raise HvdlmError(
                f"{key} {value} falls between two synchronisations of {name}, where ranks differ: choose a multiple of "
                f"communication.local.steps {every}, for example {nearest}."
            )


def _whole_gradients(config: Config, what: str) -> None:
    if config.communication.reduction == "adasum":
        raise HvdlmError(
            f"communication.reduction adasum combines whole gradients, which {what} doesn't hand over: choose "
            "--communication.reduction average, or give up the other."
        )
    if config.train.precision == "fp16":
        raise HvdlmError(f"{what} can't remember gradients whose scale changes: use --train.precision bf16 or fp32.")


def _rank(rank: int, spec: ModelSpec) -> None:
    matrices = [(p.shape[0], math.prod(p.shape[1:])) for p in spec.params if len(p.shape) > 1]
    largest = max((min(shape) for shape in matrices), default=0)
    if rank > largest:
        raise HvdlmError(
            f"communication.compression.rank {rank} is larger than the rank of every matrix of the model "
            f"({largest} at most): choose a small one, for example 4."
        )
