"""A plugin's ``keras.Model`` as a model, from int32 tokens ``[rows, time]`` to logits ``[rows, time, vocab]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_language.custom_module import PROCESS_RANDOM, CustomModuleSettings, custom_module_spec
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.models.base import ModelBase


def describe(make: Callable[[], Any], vocab: int, context: int) -> ModelSpec:
    """Return the description of the Keras model that ``make`` returns, for ``hvdlm_models``.

    The logits of position t may depend on tokens 0 to t only. Dropout follows ``train.seed`` and the step. The initial
    values are those that ``make`` draws under ``train.seed``.

    Raises:
        HvdlmError: it keeps more than its parameters from batch to batch.
    """
    module = _built(make, context)
    if any(not _is_seed(variable) for variable in module.non_trainable_variables):
        raise HvdlmError(
            "a Keras model with weights that aren't trained (batch normalisation's statistics) keeps them from batch "
            "to batch, and checkpoints don't contain them: use LayerNormalization or GroupNormalization."
        )

    def values(seed: int) -> list[np.ndarray]:
        with PROCESS_RANDOM:
            tf.keras.utils.set_random_seed(seed)
            return [np.asarray(variable) for variable in _built(make, context).trainable_variables]

    # Not by path: Keras numbers layers as they are made, so that the same model made again has other paths.
    shapes = {f"{i:03}.{v.name}": tuple(v.shape) for i, v in enumerate(module.trainable_variables)}
    return custom_module_spec(CustomModuleSettings(vocab, context, "tensorflow", make), shapes, values)


def _built(make: Callable[[], Any], context: int) -> Any:
    with PROCESS_RANDOM:
        module = make()
        module(tf.zeros([1, context], tf.int32))
    return module


def _is_seed(variable: Any) -> bool:
    return str(variable.name) == "seed_generator_state"


class CustomModule(ModelBase):
    """The model, its parameters replaced by parts of the flat vector."""

    def __init__(self, settings: CustomModuleSettings, model_shard: ModelShard, collectives: Collectives) -> None:
        super().__init__(settings, model_shard, collectives)
        self._module = _built(settings.make, settings.context)
        self._ordered: list[tf.Tensor] = []

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Use these tensors as parameters."""
        self._ordered = [parameters[name] for name in sorted(parameters)]

    def hidden(
        self, tokens: tf.Tensor, x: tf.Tensor | None, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens``, and ``carry`` unchanged."""
        # The states of random layers (``describe`` allows no others) are replaced by this step's seed, so that a
        # resumed run draws the same numbers.
        states = enumerate(self._module.non_trainable_variables)
        seeds = [tf.cast(seed + tf.constant([0, i]), variable.dtype) for i, variable in states]
        return self._module.stateless_call(self._ordered, seeds, tokens, training=training)[0], carry
