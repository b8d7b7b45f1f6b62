"""A model on this rank as it answers: evaluates, scores the next token, predicts, reads. ``trainable.py`` trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.axis_groups import Axes
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.types import Batch
from hvdlm_tensorflow.collectives import Collectives
from hvdlm_tensorflow.counted_graph import CountedGraph
from hvdlm_tensorflow.losses import ctc
from hvdlm_tensorflow.models import make_model
from hvdlm_tensorflow.pipeline import Pipeline

_HALF = {"bf16": tf.bfloat16, "fp16": tf.float16}


class Answering(ABC):
    """This rank's share of the model; every answer is one graph."""

    def __init__(
        self, spec: ModelSpec, model_shard: ModelShard, axes: Axes, counters: TrafficCounters, config: Config, rank: int
    ) -> None:
        self._spec, self._model_shard, self._axes, self._counters, self._config = (
            spec,
            model_shard,
            axes,
            counters,
            config,
        )
        self._collectives = Collectives(axes.tensor, model_shard)
        self._model = make_model(spec, model_shard, self._collectives)
        self._model.dtype = _HALF.get(config.train.precision, tf.float32)
        self._pipeline = Pipeline(model_shard, axes, config.parallel.schedule, rank, self._model.dtype)
        self._eval_carry: Any = None
        self._eval_graph = CountedGraph(self._evaluate, counters)
        self._extend_graph = CountedGraph(self._extend, counters, reduce_retracing=True)
        self._predict_graph = CountedGraph(self._predict, counters, reduce_retracing=True)
        self._read_graph = CountedGraph(self._read, counters, reduce_retracing=True)

    @abstractmethod
    def _parameters(self) -> Mapping[str, tf.Tensor]:
        """Return the weights that the model computes with."""

    def _losses(
        self, parameters: Any, inputs: Any, x: Any, targets: Any, weights: Any, carry: Any, seed: Any, training: bool
    ) -> tuple[tf.Tensor, Any]:
        """Return the losses ``[rows, time]`` in nats, 0 where the target doesn't count, and the carried state.

        In a stage but the last: what it passes on, instead of losses. ``x``: what the stage before passed on, in the
        first stage the batch's features. A loss of whole rows (CTC): ``[rows]``.
        """
        self._model.bind(parameters)
        checkpointing = self._config.train.activation_checkpointing
        hidden, carry = self._model.hidden(inputs, x, carry, training, checkpointing, seed)
        if not self._model_shard.stage.last:
            return hidden, carry
        scores = tf.cast(self._model.scores(hidden), tf.float32)  # [rows, time, vocab / tensor ranks]
        if self._spec.loss == "ctc":
            return ctc(scores, self._model.lengths(x), targets, weights), carry
        smoothing = self._config.train.label_smoothing if training else 0.0
        losses = self._collectives.cross_entropy(scores, targets, smoothing)
        return (losses if weights is None else losses * weights), carry

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (loss sum, tokens); see ``interfaces.Trainable``."""
        fresh = batch.reset or self._eval_carry is None
        carry = self._model.cache(len(batch.inputs)) if fresh else self._eval_carry

        def compute(x: tf.Tensor | None) -> tf.Tensor:
            x = features(batch) if x is None else x
            made, self._eval_carry = self._eval_graph(None, x, *tensors(batch), carry)
            return made

        made = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        return (float(made) if self._model_shard.stage.last else 0.0), batch.tokens

    def _evaluate(self, x: Any, inputs: Any, targets: Any, weights: Any, carry: Any) -> tuple[tf.Tensor, Any]:
        seed = tf.constant([0, 0])
        made, carry = self._losses(self._parameters(), inputs, x, targets, weights, carry, seed, False)
        return (tf.reduce_sum(tf.cast(made, tf.float64)) if self._model_shard.stage.last else made), carry

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token and the cache; see ``interfaces.Trainable``."""
        inputs = tf.constant(tokens, tf.int32)
        cache = self._model.decoding_cache(len(tokens)) if cache is None else cache
        self._model.check_length(cache, tokens.shape[1])
        settings, stage = self._spec.settings, self._model_shard.stage

        def compute(x: tf.Tensor | None) -> tf.Tensor:
            nonlocal cache
            made, cache = self._extend_graph(None, inputs, x, cache)
            return made

        made = self._pipeline.relay((*tokens.shape, settings.width), compute)
        if stage.count > 1:
            scores = made if stage.last else tf.zeros((len(tokens), settings.vocab))
            made = self._axes.model.broadcast(scores, (stage.count - 1) * self._model_shard.tensor, "pipeline.scores")
        return made.numpy(), cache

    def _extend(self, inputs: tf.Tensor, x: Any, cache: Any) -> tuple[tf.Tensor, Any]:
        self._model.bind(self._parameters())
        hidden, cache = self._model.extend(inputs, x, cache)
        if not self._model_shard.stage.last:
            return hidden, cache
        return tf.cast(self._collectives.all_scores(self._model.scores(hidden[:, -1])), tf.float32), cache

    def predict(self, batch: Batch) -> np.ndarray:
        """Return all scores of the batch; see ``interfaces.Trainable``."""
        return self._predict_graph(None, tf.constant(batch.inputs), features(batch)).numpy()

    def _predict(self, inputs: tf.Tensor, x: Any) -> tf.Tensor:
        self._model.bind(self._parameters())
        carry, seed = self._model.cache(tf.shape(inputs)[0]), tf.constant([0, 0])
        hidden, _ = self._model.hidden(inputs, x, carry, False, False, seed)
        return tf.cast(self._model.scores(hidden), tf.float32)

    def read(self, batch: Batch) -> Any:
        """Return the cache of what the model has read; see ``interfaces.Trainable``."""
        return self._read_graph(None, features(batch))

    def _read(self, x: Any) -> Any:
        self._model.bind(self._parameters())
        return self._model.read(x)

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache of these rows; see ``interfaces.Trainable``."""
        return self._model.select(cache, tf.constant(rows))


def features(batch: Batch) -> dict[str, tf.Tensor] | None:
    """Return what the model reads besides tokens; None where it reads tokens alone."""
    return {name: tf.constant(array) for name, array in batch.features.items()} or None


def tensors(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """Return inputs, targets and weights of a batch."""
    weights = None if batch.weights is None else tf.constant(batch.weights)
    return tf.constant(batch.inputs), tf.constant(batch.targets), weights
