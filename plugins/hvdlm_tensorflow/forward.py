"""The loss of a batch: the forward pass of this rank's shard of the model, and the loss of its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.types import Batch
from hvdlm_language.axis_groups import Axes
from hvdlm_language.loss_terms import LossTerms
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.losses import chunked_cross_entropy, chunked_evaluation, ctc, rows_of_chunk
from hvdlm_tensorflow.models import make_model
from hvdlm_tensorflow.pipeline import Pipeline

_HALF_PRECISION = {"bf16": tf.bfloat16, "fp16": tf.float16}


class Forward:
    """The forward pass, shared by training (``trainable.py``) and inference (``inference.py``).

    Attributes:
        model: the layers of this rank's pipeline stage; every graph binds its parameters.
        chunks: the forward passes that this rank computes: this one, or one of every virtual stage.
        collectives: those of its tensor group.
        context: the ranks that have other positions of the same rows; None: there are none.
        pipeline: passes activations and their gradients between stages.
        dtype: in which products are computed.
    """

    def __init__(self, spec: ModelSpec, model_shard: ModelShard, axes: Axes, config: Config, rank: int) -> None:
        self.spec = spec
        self.model_shard = model_shard
        self.axes = axes
        self.config = config
        self.collectives = Collectives(axes.tensor, model_shard)
        self.dtype = _HALF_PRECISION.get(config.train.precision, tf.float32)
        model: Any = make_model(spec, model_shard, self.collectives, self.dtype)
        self.context = model.context = axes.context
        self.model = model
        self.pipeline = Pipeline(model_shard, axes, config.parallel.schedule, rank, self.dtype)
        virtual = [Forward(spec, shard, axes, config, rank) for shard in model_shard.virtual]
        self.chunks = tuple(virtual) or (self,)

    def losses(
        self,
        parameters: Mapping[str, tf.Tensor],
        x: Any,
        inputs: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor | None,
        starts: tf.Tensor | None,
        carry: Any,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, Any]:
        """Return the losses of training in nats and the carried state.

        The losses are ``[rows, time]``, 0 where the target doesn't count; of CTC, which judges whole rows, ``[rows]``.
        Every pipeline stage but the last returns its activations in their place. ``x``: the activations of the stage
        before; in the first stage, the batch's features. ``starts``: ``Batch.document_starts``.
        """
        hidden, carry = self._hidden(parameters, inputs, x, starts, carry, True, seed)
        if not self.model_shard.stage.last:
            return hidden, carry
        terms = LossTerms.of(self.config.train)
        head = getattr(self.model, "head", None)
        if self._is_chunked(head, targets):
            return self._chunked_losses(hidden, head, targets, weights, terms), carry
        # In float32: exponentials of large scores overflow in half precision.
        scores = tf.cast(self.model.scores(hidden), tf.float32)  # [rows, time, vocab / tensor ranks]
        if self.spec.loss == "ctc":
            return ctc(scores, self.model.lengths(x), targets, weights), carry
        losses = self.collectives.cross_entropy(scores, targets, terms)
        return (losses if weights is None else losses * weights), carry

    def evaluated(
        self,
        parameters: Mapping[str, tf.Tensor],
        x: Any,
        inputs: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor | None,
        starts: tf.Tensor | None,
        carry: Any,
    ) -> tuple[tf.Tensor, Any]:
        """Return the figures of an evaluation, float64 ``[2]``, and the carried state.

        The figures are the sum of the losses in nats, without what training adds to them, and the number of targets
        that count of which no other token has a higher score; of CTC 0. Otherwise as ``losses``.
        """
        hidden, carry = self._hidden(parameters, inputs, x, starts, carry, False, tf.constant([0, 0]))
        if not self.model_shard.stage.last:
            return hidden, carry
        head: Any = getattr(self.model, "head", None)
        if self._is_chunked(head, targets):
            flat = tf.reshape(hidden, [targets.shape.num_elements(), hidden.shape[-1]])
            losses, highest = chunked_evaluation(flat, head[0], head[1], tf.reshape(targets, [-1]))
        else:
            scores = tf.cast(self.model.scores(hidden), tf.float32)
            if self.spec.loss == "ctc":
                losses = ctc(scores, self.model.lengths(x), targets, weights)
                highest, weights = tf.zeros_like(losses), None
            else:
                losses, highest = self.collectives.evaluated(scores, targets)
        figures = tf.reshape(tf.stack([losses, tf.cast(highest, tf.float32)]), [2, -1])
        counted = figures if weights is None else figures * tf.reshape(weights, [-1])
        return tf.reduce_sum(tf.cast(counted, tf.float64), 1), carry

    def _hidden(
        self,
        parameters: Mapping[str, tf.Tensor],
        inputs: tf.Tensor,
        x: Any,
        starts: tf.Tensor | None,
        carry: Any,
        training: bool,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, Any]:
        """Return the activations of the model's layers and the carried state; see ``losses``."""
        self.model.bind(parameters)
        divided = {} if starts is None else {"starts": starts}  # models that aren't divided don't take it
        checkpointing = self.config.train.activation_checkpointing
        return self.model.hidden(inputs, x, carry, training, checkpointing, seed, **divided)

    def _is_chunked(self, head: Any, targets: tf.Tensor) -> bool:
        """Return whether the logits of a batch are computed in chunks: where they are more than one chunk.

        Ranks that share a vocabulary would exchange figures for every chunk. Gradients in fp16 have to be scaled before
        they are rounded.
        """
        count = targets.shape.num_elements()  # None: open in the graph
        if head is None or not count or self.spec.loss == "ctc" or self.config.train.precision == "fp16":
            return False
        return self.collectives.size == 1 and count > rows_of_chunk(count, head[0].shape[0])

    def _chunked_losses(
        self,
        hidden: tf.Tensor,
        head: Any,
        targets: tf.Tensor,
        weights: tf.Tensor | None,
        terms: LossTerms,
    ) -> tf.Tensor:
        # Adapters of layers leave the head as it is. TensorFlow would leave out what isn't used, if it needed no order.
        adapted = [adapter.weight for adapter in self.spec.adapters]
        wanted = True, not (adapted and all(name.startswith("layers.") for name in adapted))
        table, bias = head
        flat = tf.reshape(hidden, [targets.shape.num_elements(), hidden.shape[-1]])
        flat_weights = None if weights is None else tf.reshape(weights, [-1])
        losses = chunked_cross_entropy(flat, table, bias, tf.reshape(targets, [-1]), flat_weights, terms, wanted)
        return tf.reshape(losses, targets.shape)

    def features(self, batch: Batch) -> dict[str, tf.Tensor] | None:
        """Return what the model reads besides tokens; None where it reads tokens alone."""
        return {name: tf.constant(array) for name, array in batch.features.items()} or None

    def tensors(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None, tf.Tensor | None]:
        """Return the inputs, targets, weights and starts of documents of a batch."""
        optional = batch.weights, batch.document_starts
        weights, starts = (None if array is None else tf.constant(array) for array in optional)
        return tf.constant(batch.inputs), tf.constant(batch.targets), weights, starts
