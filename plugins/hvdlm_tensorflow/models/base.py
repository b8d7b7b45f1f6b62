"""What a model needs that carries nothing from batch to batch: a plugin's then implements ``hidden`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives


class Plain:
    """A language model over parameters by name, ``self.p``; its settings are ``self.s``."""

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s, self.dtype = settings, tf.float32
        self.p: dict[str, tf.Tensor] = {}

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Take these tensors as parameters, in the precision of the run."""
        self.p = {name: tf.cast(tensor, self.dtype) for name, tensor in parameters.items()}

    def hidden(
        self, tokens: tf.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens`` ``[rows, time]``, and ``carry`` as it is.

        Position t may depend on tokens 0 to t alone. ``seed``: int32 ``[2]``, from which dropout is drawn.
        """
        raise NotImplementedError

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return what ``hidden`` has computed: the logits."""
        return hidden

    def cache(self, rows: int) -> tf.Tensor:
        """Return what training carries: nothing."""
        return tf.zeros(())

    def decoding_cache(self, rows: int) -> tf.Tensor:
        """Return no tokens yet: they are all read again for each that follows."""
        return tf.zeros([rows, 0], tf.int32)

    def check_length(self, cache: tf.Tensor, more: int) -> None:
        """Accept any length."""

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Return the logits of tokens that follow those in ``cache``, and all of them."""
        read = tf.concat([cache, tokens], 1)
        return self.hidden(read, None, None, False, False, tf.zeros([2], tf.int32))[0], read

    def carry_arrays(self, carry: Any) -> dict[str, Any]:
        """Return nothing: nothing is carried from batch to batch."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, Any], micro: int | None) -> dict[int, Any]:
        """Return nothing."""
        return {}
