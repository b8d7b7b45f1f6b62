"""The small models whose steps are timed to fit a machine's rates.

They differ in which kind of work dominates: products of several shapes, attention over long contexts, large
vocabularies, many layers or micro-batches that do little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hvdlm.config import CommunicationConfig, CompressionConfig, Config, ModelConfig, ParallelConfig
from hvdlm.planning.hardware import OUTER_UPDATE


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
    Calibration(4, 64, 2, 32, 4, 4, 64),
    Calibration(2, 128, 4, 64, 8, 8, 64),
    Calibration(2, 128, 4, 64, 8, 2, 64),
    Calibration(2, 256, 4, 64, 8, 8, 64),
    Calibration(1, 512, 8, 64, 8, 8, 64),
    Calibration(1, 256, 4, 256, 2, 2, 64),
    Calibration(1, 128, 4, 128, 8, 8, 2048),
    Calibration(6, 96, 4, 48, 8, 8, 512),
    Calibration(2, 384, 6, 32, 16, 16, 64),
    Calibration(3, 192, 6, 128, 4, 4, 256),
    Calibration(1, 384, 8, 64, 4, 1, 8000),
    Calibration(2, 192, 3, 64, 4, 4, 128, "llama"),
)
"""Models that each rank trains by itself, all ranks at once."""


def config_of(base: Config, one: Calibration, data: int = 1, pipeline: int = 1, tensor: int = 1) -> Config:
    """Return the configuration of a calibration in a layout, with the machine's options of ``base``."""
    return replace(
        base,
        model=ModelConfig(name=one.model, layers=one.layers, width=one.width, heads=one.heads, bias=False),
        data=replace(base.data, context=one.context),
        train=replace(
            base.train, steps=10**7, batch_size=one.rows * data, micro_batch_size=one.micro_rows, compile="auto"
        ),
        parallel=ParallelConfig(data, pipeline, tensor),
        communication=CommunicationConfig(
            timeout=base.communication.timeout, compression=CompressionConfig(algorithm="none")
        ),
    )


_SMALL = Calibration(2, 128, 4, 64, 8, 8, 64)
_MANY = Calibration(4, 128, 4, 64, 8, 2, 64)
_WIDE = Calibration(2, 256, 4, 32, 8, 8, 64)
COMPRESSORS = ("int8", "power_sgd")  # measured beside the one that is asked for


def layouts_of(base: Config, size: int) -> list[tuple[str, Config, int]]:
    """Return (kind, configuration, vocabulary) of what ``size`` ranks train together; see ``layout_fit``."""
    chosen = [("data", config_of(base, one, size), one.vocab) for one in (_SMALL, _MANY, _WIDE)]
    chosen += [
        ("data", _with_zero(config_of(base, one, size), stage), one.vocab) for one, stage in ((_WIDE, 1), (_MANY, 2))
    ]
    if size % 2 == 0:
        half = size // 2
        chosen += [("blocking", config_of(base, one, half, tensor=2), one.vocab) for one in (_SMALL, _WIDE)]
        chosen += [("blocking", config_of(base, _MANY, half, pipeline=2), _MANY.vocab)]
    asked = base.communication.compression.algorithm
    for algorithm in dict.fromkeys((*COMPRESSORS, *([] if asked == "none" else [asked]))):
        chosen += [
            (algorithm, _compressed(config_of(base, one, size), algorithm), one.vocab) for one in (_SMALL, _WIDE)
        ]
    chosen.append((OUTER_UPDATE, _in_rounds(config_of(base, _WIDE, size)), _WIDE.vocab))
    return chosen


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
