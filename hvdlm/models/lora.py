"""LoRA: low-rank adapters to frozen weights (Hu et al. 2021).

In place of an adapted weight ``W`` ``[inputs, outputs]``, every framework uses (eq. 3)::

    W + alpha / rank * down @ up      # down [inputs, rank], up [rank, outputs]

``down`` starts normal with standard deviation 1 / sqrt(inputs), ``up`` with zeros, so that the adapted model starts as
the base model. For a recurrent layer's weight ``[inputs, gates, hidden]``, ``up`` is ``[rank, gates, hidden]``.
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

DEFAULT_LAYERS = ("*.attention.*", "*.reading.*", "*.input.*", "*.recurrent.*")
"""The default of ``lora.layers``: self-attention, cross-attention (``reading``), and recurrent layers."""


def adapt(spec: ModelSpec, options: LoRAConfig) -> ModelSpec:
    """Return ``spec`` with frozen parameters and trained adapters; without a rank, ``spec`` itself.

    Raises:
        HvdlmError: the model has no such layers.
        ValueError: the rank is no positive integer.
    """
    if options.rank is None:
        return spec
    if type(options.rank) is not int or options.rank < 1:
        raise ValueError(f"lora.rank is {options.rank!r}")
    names = _adapted_names(spec, options.layers)
    params, adapters = [], []
    factor = (options.rank if options.alpha is None else options.alpha) / options.rank
    for base in spec.params:
        if base.name not in names:
            continue
        adapter = Adapter(base.name, f"{base.name}.lora_down", f"{base.name}.lora_up", factor)
        inputs, *outputs = base.shape
        input_axis, *output_axes = base.axes
        normal, rank = Init("normal", inputs**-0.5), options.rank
        params.append(ParamSpec(adapter.down, (inputs, rank), (input_axis, "rank"), normal, decay=True))
        params.append(ParamSpec(adapter.up, (rank, *outputs), ("rank", *output_axes), Init("zeros"), decay=True))
        adapters.append(adapter)
    # Frozen weights have no gradient: 2 of their 6 operations are saved.
    flops = spec.flops_per_token - 2.0 * _weights_without_gradient(spec, names)
    return replace(spec, params=tuple(params), frozen=spec.params, adapters=tuple(adapters), flops_per_token=flops)


def _adapted_names(spec: ModelSpec, layers: list[str] | str | None) -> set[str]:
    """Return the names of the weights that get an adapter; ``layers``: patterns, as in ``lora.layers``."""
    if spec.kind == "own":
        raise HvdlmError(
            "lora.rank: hvdlm doesn't know the layers of a plugin's own module: implement adapters in the plugin, or "
            "leave lora.rank out."
        )
    patterns = [layers] if isinstance(layers, str) else layers or []
    known = [param.name for param in spec.params if _is_matrix(param)]
    names = {pattern: {name for name in known if _matches(name, pattern)} for pattern in patterns or DEFAULT_LAYERS}
    if not any(names.values()) or (patterns and not all(names.values())):
        unmatched = next((pattern for pattern in patterns if not names[pattern]), None)
        if unmatched:
            fault = f"no weight of a {spec.kind} is called {unmatched!r}"
        else:
            fault = f"a {spec.kind} has no attention"
        available = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in known)
        raise HvdlmError(f"lora.layers: {fault}; there are {', '.join(available)}: set --lora.layers.")
    return set().union(*names.values())


def _is_matrix(param: ParamSpec) -> bool:
    """Return whether it is a weight ``[inputs, outputs]``, or a recurrent layer's ``[inputs, gates, hidden]``."""
    matrix = len(param.shape) == 2 or (len(param.shape) == 3 and "gates" in param.axes)
    return matrix and not param.name.endswith(".bias")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _weights_without_gradient(spec: ModelSpec, adapted: Collection[str]) -> int:
    """Return the number of weights that are multiplied by every token and have no gradient."""
    tied = {"embed.tokens"} if getattr(spec.settings, "tie_embeddings", False) else set()
    multiplied = [p for p in spec.params if _is_matrix(p) and (p.name.endswith(".weight") or p.name in tied)]
    return sum(math.prod(param.shape) for param in multiplied if param.name not in adapted)
