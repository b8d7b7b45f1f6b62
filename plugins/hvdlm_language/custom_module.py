"""Models that a plugin brings as a module of its framework, from tokens to logits; hvdlm doesn't know their layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hvdlm.models.spec import Init, ModelSpec, ParamSpec, Source

PROCESS_RANDOM = threading.RLock()
"""Held while random numbers of the whole process are drawn under a seed: ranks may be threads of one process."""

PREFIX = "own."
"""Prefix of the names of such a model's parameters."""


@dataclass(frozen=True)
class CustomModuleSettings:
    """Settings of such a model. ``make``: returns the module; ``framework``: the framework of the module."""

    vocab: int
    context: int
    framework: str
    make: Callable[[], Any]
    layers: int = 1
    width: int = 1


def custom_module_spec(
    settings: CustomModuleSettings, shapes: Mapping[str, tuple[int, ...]], values: Callable[[int], Iterable[np.ndarray]]
) -> ModelSpec:
    """Return the description of a model.

    Args:
        settings: its settings.
        shapes: {name: shape} of its parameters; weight decay applies to those of two dimensions or more.
        values: returns their initial values under a seed, in the same order. Those of the last seed are cached.
    """

    @lru_cache(maxsize=1)
    def initial_values(seed: int) -> dict[str, np.ndarray]:
        return dict(zip(shapes, values(seed), strict=True))

    def source(name: str) -> Source:
        return lambda seed, box: np.ascontiguousarray(initial_values(seed)[name][box], np.float32)

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
