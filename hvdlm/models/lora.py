"""LoRA: frozen weights, to some of which a product of two small matrices is added, which alone are trained.

What every framework computes with, in place of a weight ``W`` ``[inputs, outputs]`` that is adapted (Hu et al. 2021,
eq. 3)::

    W + alpha / rank * down @ up      # down [inputs, rank], up [rank, outputs]

``down`` starts normal with the standard deviation 1 / sqrt(inputs), ``up`` with zeros: the model starts as its base. Of
a recurrent layer's weight ``[inputs, gates, hidden]``, ``up`` is ``[rank, gates, hidden]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import replace
from fnmatch import fnmatchcase

from hvdlm.config import LoRAConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Adapter, Init, ModelSpec, ParamSpec

USUAL = ("*.attention.*", "*.reading.*", "*.input.*", "*.recurrent.*")
"""What ``lora.layers`` stands for where it is not set: attention, also to what an encoder read; recurrent layers."""


def adapt(spec: ModelSpec, options: LoRAConfig) -> ModelSpec:
    """Return ``spec`` with its parameters frozen and adapters to be trained; without a rank, ``spec`` itself.

    Raises:
        HvdlmError: it has no such layers; ValueError: the rank is no whole number above 0.
    """
    if options.rank is None:
        return spec
    if type(options.rank) is not int or options.rank < 1:
        raise ValueError(f"lora.rank is {options.rank!r}")
    names, params, adapters = _chosen(spec, options.layers), [], []
    factor = (options.rank if options.alpha is None else options.alpha) / options.rank
    for base in spec.params:
        if base.name not in names:
            continue
        one = Adapter(base.name, f"{base.name}.lora_down", f"{base.name}.lora_up", factor)
        (inputs, *outputs), (read, *made) = base.shape, base.axes
        start, rank = Init("normal", inputs**-0.5), options.rank
        params.append(ParamSpec(one.down, (inputs, rank), (read, "rank"), start, decay=True))
        params.append(ParamSpec(one.up, (rank, *outputs), ("rank", *made), Init("zeros"), decay=True))
        adapters.append(one)
    flops = spec.flops_per_token - 2.0 * _spared(spec, names)
    return replace(spec, params=tuple(params), frozen=spec.params, adapters=tuple(adapters), flops_per_token=flops)


def _chosen(spec: ModelSpec, asked: list[str] | str | None) -> set[str]:
    """Return the names of the weights that get an adapter."""
    if spec.kind == "own":
        raise HvdlmError(
            "lora.rank: a plugin's own module has no layers that hvdlm sees: give its plugin adapters, or leave "
            "lora.rank out."
        )
    patterns = [asked] if isinstance(asked, str) else asked or []
    known = [param.name for param in spec.params if _is_matrix(param)]
    found = {pattern: {name for name in known if _fits(name, pattern)} for pattern in patterns or USUAL}
    if not any(found.values()) or (patterns and not all(found.values())):
        lost = next((pattern for pattern in patterns if not found[pattern]), None)
        what = f"no weight of a {spec.kind} is called {lost!r}" if lost else f"a {spec.kind} has no attention"
        every = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in known)
        raise HvdlmError(f"lora.layers: {what}; there are {', '.join(every)}: set --lora.layers.")
    return set().union(*found.values())


def _is_matrix(param: ParamSpec) -> bool:
    """Return whether it is ``[inputs, outputs]``, or a recurrent layer's ``[inputs, gates, hidden]``."""
    several = len(param.shape) == 2 or (len(param.shape) == 3 and "gates" in param.axes)
    return several and not param.name.endswith(".bias")


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _spared(spec: ModelSpec, adapted: Collection[str]) -> int:
    """Return how many weights multiply once per token and have no gradient."""
    tied = {"embed.tokens"} if getattr(spec.settings, "tie_embeddings", False) else set()
    multiply = [p for p in spec.params if _is_matrix(p) and (p.name.endswith(".weight") or p.name in tied)]
    return sum(math.prod(param.shape) for param in multiply if param.name not in adapted)
