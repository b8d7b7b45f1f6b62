"""The base class of models that carry no state from batch to batch: a plugin's model implements ``hidden`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_tensorflow.collectives import Collectives


class ModelBase:
    """A language model.

    Attributes:
        s: its settings.
        p: its parameters by name.
        dtype: what it computes in.
        head: the table ``[vocab, embed]`` and bias of which ``scores`` is the product, if it is one and nothing else:
            losses of large vocabularies are then computed in chunks.
    """

    head: Any = None

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self.p: dict[str, tf.Tensor] = {}
        self.dtype = tf.float32

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Use these tensors as parameters, in the precision of the run."""
        self.p = {name: tf.cast(tensor, self.dtype) for name, tensor in parameters.items()}

    def hidden(
        self, tokens: tf.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool, seed: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens`` ``[rows, time]``, and ``carry`` unchanged.

        Those of position t may depend on tokens 0 to t only. ``seed``: int32 ``[2]``, of dropout.
        """
        raise NotImplementedError

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return the logits, which ``hidden`` has computed."""
        return hidden

    def initial_carry(self, rows: Any) -> tf.Tensor:
        """Return the state at the start of a text: there is none, and graphs take a tensor in its place."""
        return tf.zeros(())

    def cache(self, rows: int) -> tf.Tensor:
        """Return the empty cache of decoding: the tokens so far, which are all read again for each that follows."""
        return tf.zeros([rows, 0], tf.int32)

    def check_length(self, cache: tf.Tensor, added: int) -> None:
        """Accept any number of tokens."""

    def extend(self, tokens: tf.Tensor, x: tf.Tensor | None, cache: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Return the logits of tokens that follow those in ``cache``, and the grown cache."""
        text = tf.concat([cache, tokens], 1)
        return self.hidden(text, None, None, False, False, tf.zeros([2], tf.int32))[0], text

    def carry_arrays(self, carry: Any) -> dict[str, np.ndarray]:
        """Return the carried state as arrays, for checkpoints: there is none."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro_rows: int | None) -> dict[int, Any]:
        """Return the carried state of every micro-batch, from a checkpoint: there is none."""
        return {}
