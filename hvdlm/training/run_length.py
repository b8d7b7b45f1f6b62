"""The length of a run: optimizer steps that are given as such, as tokens or as epochs."""

from __future__ import annotations

import math
from dataclasses import replace

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.task import Task


def with_steps(config: Config, task: Task, done: int = 0, trained: int = 0) -> Config:
    """Return ``config`` with ``train.steps`` computed from ``train.tokens`` or ``train.epochs`` where one is given.

    The last step may train on more: steps are whole.

    Args:
        config: of the run.
        task: its task.
        done: steps of the checkpoint that the run resumes from, whose batches may have had another size.
        trained: rows on which these steps trained.

    Raises:
        HvdlmError: the task's rows have no fixed number of tokens, or no epochs.
    """
    train = config.train
    if train.tokens is not None:
        tokens: int | None = getattr(task, "row_tokens", None)
        if tokens is None:
            raise HvdlmError(
                f"train.tokens: rows of the task {config.task} differ in their tokens: give --train.epochs or "
                "--train.steps."
            )
        rows = train.tokens / tokens
    elif train.epochs is not None:
        epoch: int | None = getattr(task, "epoch_rows", None)
        if epoch is None:
            data = "a data.mixture" if config.data.mixture is not None else f"the task {config.task}"
            raise HvdlmError(f"train.epochs: {data} has no epochs: give --train.steps or --train.tokens.")
        rows = train.epochs * epoch
    else:
        return config
    steps = done + max(0, math.ceil((rows - trained) / train.batch_size))
    return replace(config, train=replace(train, steps=max(1, steps)))
