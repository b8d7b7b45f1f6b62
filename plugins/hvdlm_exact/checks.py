"""Checks the options of exact sums against the rest of the configuration."""

from __future__ import annotations

from hvdlm.config import Config
from hvdlm.errors import HvdlmError

FRAMEWORKS = ("torch", "tensorflow")  # whose plugins add up micro-batches in the order of the tree


def check(config: Config) -> None:
    """Check what ``communication.reduction exact`` needs.

    Raises:
        HvdlmError: the first option that contradicts it.
    """
    options, train, parallel = config.communication, config.train, config.parallel
    reason = next((f"{option}: {why}" for option, why in _contradictions(config) if why), None)
    if reason is not None:
        raise HvdlmError(f"communication.reduction exact can't be combined with {reason}.")
    leaf = options.exact_rows or train.micro_batch_size
    if leaf is None:
        rows = train.batch_size // (parallel.data or 1)
        raise HvdlmError(
            "communication.reduction exact computes a fixed number of sequences at a time, on any number of ranks: set "
            f"--communication.exact_rows, for example to {_divisor(rows)}."
        )
    if (train.micro_batch_size or leaf) % leaf:
        raise HvdlmError(
            f"train.micro_batch_size {train.micro_batch_size} is no multiple of communication.exact_rows {leaf}, the "
            "sequences that are computed at a time: leave it out, or choose a multiple."
        )


def _contradictions(config: Config) -> list[tuple[str, str]]:
    """Return (option, what to do) of every option that exact sums don't support; ``""``: it isn't set."""
    options, train, parallel = config.communication, config.train, config.parallel
    algorithm, ranks = options.compression.algorithm, max(parallel.tensor, parallel.pipeline)
    whole = "it doesn't sum whole gradients at every step: leave one of the two out"
    return [
        (f"communication.exchange {options.exchange}", whole if options.exchange != "all_reduce" else ""),
        (f"communication.compression.algorithm {algorithm}", whole if algorithm != "none" else ""),
        (
            f"parallel.zero {parallel.zero}",
            "each rank has the norm of its own shard, and their sum depends on the ranks: set it to 0"
            if parallel.zero
            else "",
        ),
        (
            "parallel.tensor and parallel.pipeline above 1",
            "such ranks share the sums of a single sequence, whose order depends on their number: set both to 1"
            if ranks > 1
            else "",
        ),
        (
            f"communication.predivide {options.predivide:g}",
            "gradients are divided once, after the sum: set it to 1" if options.predivide != 1.0 else "",
        ),
        (
            "train.compile true",
            "compilers choose the order of sums by measuring: set it to false" if train.compile is True else "",
        ),
        (
            f"framework {config.framework}",
            f"its plugin adds up micro-batches in an order of its own: choose {' or '.join(FRAMEWORKS)}"
            if config.framework not in FRAMEWORKS
            else "",
        ),
    ]


def _divisor(rows: int) -> int:
    """Return a divisor of a rank's rows that leaves it several leaves, where there is one."""
    return next(n for n in (8, 4, 2, 1) if rows % n == 0 and (n < rows or n == 1))
