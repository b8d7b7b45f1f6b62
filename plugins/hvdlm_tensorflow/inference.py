"""Inference: evaluation, scores of the next token, predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.protocols.types import Batch
from hvdlm_tensorflow.counted_graph import CountedGraph
from hvdlm_tensorflow.forward import Forward


class Inference(ABC):
    """The methods of ``Trainable`` that leave the parameters as they are; each runs one graph."""

    def __init__(self, forward: Forward, counters: TrafficCounters) -> None:
        self._forward = forward
        self._model = forward.model
        self._pipeline = forward.pipeline
        self._spec = forward.spec
        self._model_shard = forward.model_shard
        self._counters = counters
        self._eval_carry: Any = None
        # Of prompts every length is another shape: these graphs are traced for open lengths.
        self._eval_graph = CountedGraph(self._evaluate, counters)
        self._extend_graph = CountedGraph(self._extend, counters, reduce_retracing=True)
        self._predict_graph = CountedGraph(self._predict, counters, reduce_retracing=True)
        self._read_graph = CountedGraph(self._read, counters, reduce_retracing=True)

    @abstractmethod
    def _parameters(self) -> Mapping[str, tf.Tensor]:
        """Return the weights that the model computes with."""

    @abstractmethod
    def _show_averaged(self) -> None:
        """Have the model compute with the parameters that are evaluated, where a replica's own are others."""

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses in nats, valid tokens) of this rank's rows."""
        self._show_averaged()
        if batch.reset or self._eval_carry is None:
            self._eval_carry = self._model.initial_carry(len(batch.inputs))

        def compute(x: tf.Tensor | None) -> tf.Tensor:
            x = self._forward.features(batch) if x is None else x
            output, self._eval_carry = self._eval_graph(None, x, *self._forward.tensors(batch), self._eval_carry)
            return output

        output = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        loss_sum = float(output) if self._model_shard.stage.last else 0.0
        return loss_sum, batch.tokens

    def _evaluate(self, x: Any, inputs: Any, targets: Any, weights: Any, carry: Any) -> tuple[tf.Tensor, Any]:
        seed = tf.constant([0, 0])
        output, carry = self._forward.losses(self._parameters(), x, inputs, targets, weights, carry, seed, False)
        if self._model_shard.stage.last:
            output = tf.reduce_sum(tf.cast(output, tf.float64))
        return output, carry

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token, float32 ``[rows, vocab]``, and the cache grown by ``tokens``."""
        self._show_averaged()
        inputs = tf.constant(tokens, tf.int32)
        cache = self._model.cache(len(tokens)) if cache is None else cache
        self._model.check_length(cache, tokens.shape[1])
        settings, stage = self._spec.settings, self._model_shard.stage

        def compute(x: tf.Tensor | None) -> tf.Tensor:
            nonlocal cache
            output, cache = self._extend_graph(None, inputs, x, cache)
            return output

        scores = self._pipeline.relay((*tokens.shape, settings.width), compute)
        if stage.count > 1:  # every rank continues with the same token, so that all need the last stage's scores
            if not stage.last:
                scores = tf.zeros((len(tokens), settings.vocab))
            root = (stage.count - 1) * self._model_shard.tensor
            scores = self._forward.axes.model.broadcast(scores, root, "pipeline.scores")
        return scores.numpy(), cache

    def _extend(self, inputs: tf.Tensor, x: Any, cache: Any) -> tuple[tf.Tensor, Any]:
        self._model.bind(self._parameters())
        hidden, cache = self._model.extend(inputs, x, cache)
        if not self._model_shard.stage.last:
            return hidden, cache
        scores = self._forward.collectives.all_scores(self._model.scores(hidden[:, -1]))
        return tf.cast(scores, tf.float32), cache

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores of all positions of the batch, float32 ``[rows, time, vocab]``."""
        self._show_averaged()
        return self._predict_graph(None, tf.constant(batch.inputs), self._forward.features(batch)).numpy()

    def _predict(self, inputs: tf.Tensor, x: Any) -> tf.Tensor:
        self._model.bind(self._parameters())
        carry, seed = self._model.initial_carry(tf.shape(inputs)[0]), tf.constant([0, 0])
        hidden, _ = self._model.hidden(inputs, x, carry, False, False, seed)
        return tf.cast(self._model.scores(hidden), tf.float32)

    def read(self, batch: Batch) -> Any:
        """Return the cache of a model that has read the batch's features, for ``logits`` to continue from."""
        self._show_averaged()
        return self._read_graph(None, self._forward.features(batch))

    def _read(self, x: Any) -> Any:
        self._model.bind(self._parameters())
        return self._model.read(x)

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``."""
        return self._model.select(cache, tf.constant(rows))
