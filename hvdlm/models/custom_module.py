"""A model that a plugin brings as its framework's own module: hvdlm sees tokens go in and scores come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hvdlm.models.spec import Init, ModelSpec, ParamSpec, Source

PREFIX = "own."
"""What the names of such a model's parameters begin with."""


@dataclass(frozen=True)
class OwnSettings:
    """What hvdlm knows of such a model. ``make``: returns the module; ``framework``: whose module it is."""

    vocab: int
    context: int
    framework: str
    make: Callable[[], Any]
    layers: int = 1
    width: int = 1


def own_spec(
    settings: OwnSettings, shapes: Mapping[str, tuple[int, ...]], values: Callable[[int], Iterable[np.ndarray]]
) -> ModelSpec:
    """Return the description of a model.

    Args:
        settings: what hvdlm knows of it.
        shapes: {name: shape} of its parameters; of matrices, weight decay applies to all.
        values: their initial values under a seed, in the same order. Those of the seed asked for last are kept.
    """

    @lru_cache(maxsize=1)
    def named(seed: int) -> dict[str, np.ndarray]:
        return dict(zip(shapes, values(seed), strict=True))

    def source(name: str) -> Source:
        return lambda seed, box: np.ascontiguousarray(named(seed)[name][box], np.float32)

    params = tuple(
        ParamSpec(
            f"{PREFIX}{name}",
            shape,
            ("own",) * len(shape),
            Init("zeros"),
            decay=len(shape) > 1,
            source=source(name),
        )
        for name, shape in shapes.items()
    )
    return ModelSpec("own", settings, params, 6.0 * sum(p.size for p in params))
