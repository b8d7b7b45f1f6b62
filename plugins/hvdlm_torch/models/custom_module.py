"""A plugin's ``torch.nn.Module`` as a model, from int32 tokens ``[rows, time]`` to logits ``[rows, time, vocab]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.custom_module import PREFIX, PROCESS_RANDOM, CustomModuleSettings, custom_module_spec
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models.base import ModelBase


def describe(make: Callable[[], torch.nn.Module], vocab: int, context: int) -> ModelSpec:
    """Return the description of the module that ``make`` returns, for ``hvdlm_models``.

    The logits of position t may depend on tokens 0 to t only. Dropout follows ``train.seed`` and the step where
    ``model.dropout`` is not 0. The initial values are those that ``make`` draws under ``train.seed``.

    Raises:
        HvdlmError: it keeps more than its parameters from batch to batch.
    """
    with PROCESS_RANDOM:
        module = make()
    if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        raise HvdlmError(
            "a module with batch normalisation keeps statistics from batch to batch, which checkpoints don't contain: "
            "use torch.nn.LayerNorm or GroupNorm."
        )

    def values(seed: int) -> list[np.ndarray]:
        with PROCESS_RANDOM, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [p.detach().float().cpu().numpy() for p in make().parameters()]

    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return custom_module_spec(CustomModuleSettings(vocab, context, "torch", make), shapes, values)


class CustomModule(ModelBase):
    """The module, its parameters replaced by views of the flat vector."""

    def __init__(self, settings: CustomModuleSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        super().__init__(settings, model_shard, collectives)
        with PROCESS_RANDOM:
            self._module = settings.make()

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as parameters, and move the module's buffers to their device."""
        self.p = {name.removeprefix(PREFIX): tensor for name, tensor in parameters.items()}
        self._module.to(next(iter(self.p.values())).device)

    def hidden(
        self, tokens: torch.Tensor, x: torch.Tensor | None, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens``, and ``carry`` unchanged."""
        self._module.train(training)
        return functional_call(self._module, self.p, (tokens,)), carry
