"""The small models whose steps are timed to fit a machine's rates.

They differ in which kind of work dominates: products of several shapes, attention over long contexts, large
vocabularies, many layers or micro-batches that do little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvdlm.config import Config, ModelConfig, ParallelConfig


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
    )
