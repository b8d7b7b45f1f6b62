"""The small models whose steps are timed to fit a machine's rates.

They differ in which kind of work dominates: products of several shapes, attention over long contexts, large
vocabularies, many layers or micro-batches that do little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hvdlm.config import CommunicationConfig, CompressionConfig, Config, ModelConfig, ParallelConfig
from hvdlm.planning.hardware import OUTER_UPDATE
from hvdlm_planner.timed_record import DATA, PIPELINE, TENSOR, ZERO


@dataclass(frozen=True)
class Calibration:
    """A model and its batch, in sequences of a rank."""

    layers: int
    width: int
    heads: int
    context: int
    rows: int
    micro_rows: int
    vocab: int
    model: str = "gpt"


ALONE = (
    Calibration(1, 128, 4, 32, 4, 4, 64),
    Calibration(3, 64, 2, 32, 4, 4, 64),
    Calibration(2, 128, 4, 64, 8, 8, 64),
    Calibration(2, 128, 4, 64, 8, 2, 64),
    Calibration(2, 256, 4, 64, 8, 8, 64),
    Calibration(1, 512, 8, 64, 8, 8, 64),
    Calibration(1, 256, 4, 256, 2, 2, 64),
    Calibration(1, 128, 4, 128, 8, 8, 2048),
    Calibration(4, 96, 4, 48, 8, 8, 512),
    Calibration(1, 384, 6, 32, 16, 16, 64),
    Calibration(2, 192, 6, 128, 4, 4, 256),
    Calibration(1, 384, 8, 64, 4, 1, 8000),
    Calibration(2, 192, 3, 64, 4, 4, 128, "llama"),
)
"""Models that each rank trains by itself, all ranks at once."""


def config_of(base: Config, one: Calibration, data: int = 1, pipeline: int = 1, tensor: int = 1) -> Config:
    """Return the configuration of a calibration in a layout, with the machine's options of ``base``."""
    # Where it is null, TensorFlow keeps no sum of micro-batches.
    micro = one.micro_rows if one.micro_rows < one.rows else None
    return replace(
        base,
        model=ModelConfig(name=one.model, layers=one.layers, width=one.width, heads=one.heads, bias=False),
        data=replace(base.data, context=one.context),
        train=replace(base.train, steps=10**7, batch_size=one.rows * data, micro_batch_size=micro, compile="auto"),
        parallel=ParallelConfig(data, pipeline, tensor),
        communication=CommunicationConfig(
            timeout=base.communication.timeout, compression=CompressionConfig(algorithm="none")
        ),
    )


_SMALL = Calibration(2, 128, 4, 64, 8, 8, 64)
_MANY = Calibration(2, 192, 4, 64, 8, 2, 64)
_HALVES = Calibration(4, 192, 4, 64, 8, 4, 64)
_WIDE = Calibration(2, 256, 4, 64, 8, 8, 64)
_LARGE = Calibration(2, 320, 4, 32, 8, 8, 64)
COMPRESSORS = ("int8", "power_sgd")  # measured beside the one that is asked for


def layouts_of(base: Config, size: int) -> list[tuple[str, Config, int]]:
    """Return (kind, configuration, vocabulary) of what ``size`` ranks train together; see ``layout_fit``.

    The first of each kind are first: where time is short, the last ones are left out. The first of data ranks send
    little, since a slow network takes longest for these.
    """
    asked = base.communication.compression.algorithm
    algorithms = dict.fromkeys((*COMPRESSORS, *([] if asked == "none" else [asked])))
    first: list[tuple[str, Config, Calibration]] = [(DATA, config_of(base, _SMALL, size), _SMALL)]
    second: list[tuple[str, Config, Calibration]] = [(DATA, config_of(base, one, size), one) for one in (_WIDE, _MANY)]
    if size % 2 == 0:
        half = size // 2
        first += [(TENSOR, config_of(base, _WIDE, half, tensor=2), _WIDE)]
        first += [(PIPELINE, config_of(base, _MANY, half, pipeline=2), _MANY)]
        second += [(TENSOR, config_of(base, one, half, tensor=2), one) for one in (_SMALL, _LARGE)]
        second += [(PIPELINE, config_of(base, _HALVES, half, pipeline=2), _HALVES)]
    first += [(algorithm, _compressed(config_of(base, _LARGE, size), algorithm), _LARGE) for algorithm in algorithms]
    first += [(OUTER_UPDATE, _in_rounds(config_of(base, _SMALL, size)), _SMALL)]
    first += [(ZERO, _with_zero(config_of(base, _WIDE, size), 1), _WIDE)]
    second += [(ZERO, _with_zero(config_of(base, _MANY, size), 2), _MANY)]
    second += [(algorithm, _compressed(config_of(base, _SMALL, size), algorithm), _SMALL) for algorithm in algorithms]
    second += [(OUTER_UPDATE, _in_rounds(config_of(base, _WIDE, size)), _WIDE)]
    return [(kind, config, one.vocab) for kind, config, one in (*first, *second)]


def _with_zero(config: Config, stage: Any) -> Config:
    return replace(config, parallel=replace(config.parallel, zero=stage))


def _compressed(config: Config, algorithm: str) -> Config:
    options = config.communication
    return replace(
        config, communication=replace(options, compression=replace(options.compression, algorithm=algorithm))
    )


def _in_rounds(config: Config) -> Config:
    """Return ``config`` with DiLoCo's outer update at every second step."""
    options = config.communication
    local = replace(options.local, steps=2)
    return replace(config, communication=replace(options, exchange="diloco", local=local))
