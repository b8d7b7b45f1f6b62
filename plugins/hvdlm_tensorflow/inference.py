"""Inference: evaluation, scores of the next token, predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.communication.traffic import TrafficCounters
from hvdlm.protocols.inference import SamplingRule
from hvdlm.protocols.model import JoinsCaches
from hvdlm.protocols.types import Batch
from hvdlm_language.context_ranks import cut_all
from hvdlm_tensorflow.counted_graph import CountedGraph
from hvdlm_tensorflow.forward import Forward
from hvdlm_tensorflow.gathered_layers import GatheredLayers
from hvdlm_tensorflow.sampling import choose


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
        self.joins_caches = isinstance(self._model, JoinsCaches)
        self._layers: GatheredLayers | None = None
        self._rounded: Any = None  # the weights in the precision of the run, while the parameters stay as they are
        # Of prompts every length is another shape: these graphs are traced for open lengths.
        self._eval_graphs = self._graphs(self._evaluate)
        self._extend_graphs = self._graphs(self._extend, reduce_retracing=True)
        self._first_tokens_graphs = self._graphs(self._sample, reduce_retracing=True)
        self._next_tokens_graphs = self._graphs(self._sample, reduce_retracing=True)  # of one token a row
        self._round_graph = CountedGraph(self._round, counters)
        self._predict_graph = CountedGraph(self._predict, counters, reduce_retracing=True)
        self._read_graph = CountedGraph(self._read, counters, reduce_retracing=True)

    def _gather_in(self, layers: GatheredLayers) -> None:
        """Have the model gather its parameters by ``layers``."""
        model: Any = self._model
        model.layers = self._layers = layers

    def _graphs(self, function: Callable[..., Any], **options: Any) -> list[CountedGraph]:
        """Return a graph of ``function(chunk, ...)`` for every chunk."""
        chunks = range(len(self._forward.chunks))
        return [CountedGraph(partial(function, chunk), self._counters, **options) for chunk in chunks]

    @abstractmethod
    def _parameters(self) -> Mapping[str, tf.Tensor]:
        """Return the weights that the model computes with."""

    @abstractmethod
    def _show_averaged(self) -> None:
        """Have the model compute with the parameters that are evaluated, where a replica's own are others."""

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses in nats, valid tokens) of this rank's rows, with context ranks of its positions."""
        loss_sum, tokens, _ = self.eval_figures(batch)
        return loss_sum, tokens

    def eval_figures(self, batch: Batch) -> tuple[float, float, float]:
        """Return ``eval_step``'s figures and the valid tokens of which no other has a higher score."""
        self._show_averaged()
        (batch,) = cut_all([batch], self._forward.context)
        if batch.reset or self._eval_carry is None:
            self._eval_carry = self._model.initial_carry(len(batch.inputs))

        def compute(chunk: int, x: tf.Tensor | None) -> tf.Tensor:
            x, graph = self._forward.features(batch) if x is None else x, self._eval_graphs[chunk]
            output, self._eval_carry = graph(None, x, *self._forward.tensors(batch), self._eval_carry)
            return output

        output = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        loss_sum, correct = output.numpy().tolist() if self._model_shard.stage.last else (0.0, 0.0)
        return loss_sum, batch.tokens, correct

    def _evaluate(
        self, chunk: int, x: Any, inputs: Any, targets: Any, weights: Any, starts: Any, carry: Any
    ) -> tuple[tf.Tensor, Any]:
        evaluated = self._forward.chunks[chunk].evaluated
        return evaluated(self._parameters(), x, inputs, targets, weights, starts, carry)

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token, float32 ``[rows, vocab]``, and the cache grown by ``tokens``."""
        scores, cache = self._decode(self._extend_graphs, tokens, cache)
        return self._from_last_stage(scores, (len(tokens), self._spec.settings.vocab), "scores").numpy(), cache

    def sample(self, tokens: np.ndarray, cache: Any, uniform: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, Any]:
        """Return the tokens chosen from those scores, int32 ``[rows, draws]``, and the cache grown by ``tokens``."""
        graphs = self._first_tokens_graphs if cache is None else self._next_tokens_graphs
        if rule.temperature:  # tensors, so that other values need no other graph
            numbers = (tf.constant(value, tf.float64) for value in (rule.temperature, rule.top_p))
            temperature, top_p = numbers
            rule = SamplingRule(rule.vocab, temperature, tf.constant(rule.top_k), top_p)
        chosen, cache = self._decode(graphs, tokens, cache, tf.constant(uniform), rule)
        return self._from_last_stage(chosen, uniform.shape, "tokens", tf.int32).numpy(), cache

    def join(self, caches: Sequence[Any], rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        model: Any = self._model
        return [model.join(of_chunk, tf.constant(rows)) for of_chunk in zip(*caches, strict=True)]

    def _decode(
        self, graphs: Sequence[CountedGraph], tokens: np.ndarray, cache: Any, *more: Any
    ) -> tuple[tf.Tensor | None, Any]:
        """Return what the chunks' ``graphs`` compute from the scores of the next token (None: a later stage), and the
        cache.
        """
        self._show_averaged()
        if self._rounded is None and not self._layers:
            self._rounded = self._round_graph(None)
        inputs = tf.constant(tokens, tf.int32)
        models = [chunk.model for chunk in self._forward.chunks]
        caches = [model.cache(len(tokens)) for model in models] if cache is None else list(cache)
        models[0].check_length(caches[0], tokens.shape[1])

        def compute(chunk: int, x: tf.Tensor | None) -> tf.Tensor:
            output, caches[chunk] = graphs[chunk](None, self._rounded, inputs, x, caches[chunk], *more)
            return output

        output = self._pipeline.relay((*tokens.shape, self._spec.settings.width), compute)
        return output if self._model_shard.stage.last else None, caches

    def _from_last_stage(
        self, output: tf.Tensor | None, shape: Sequence[int], name: str, dtype: tf.DType = tf.float32
    ) -> tf.Tensor:
        """Return the last stage's ``output`` of ``shape``: every rank continues with the same token."""
        stage = self._model_shard.stage
        if stage.count > 1:
            output = tf.zeros(shape, dtype) if output is None else output
            root = (stage.count - 1) * self._model_shard.tensor
            output = self._forward.axes.model.broadcast(output, root, f"pipeline.{name}")
        return output

    def _round(self) -> dict[str, tf.Tensor]:
        """Return the weights that texts are generated with, rounded once and not for every token."""
        kept = "norm" if self.joins_caches else ""  # other models choose themselves what they round
        model: Any = self._model
        return {n: tf.identity(t) if kept in n else tf.cast(t, model.dtype) for n, t in self._parameters().items()}

    def _extend(self, chunk: int, weights: Any, inputs: tf.Tensor, x: Any, cache: Any) -> tuple[tf.Tensor, Any]:
        model: Any = self._forward.chunks[chunk].model
        model.bind(self._parameters() if self._layers else weights)
        hidden, cache = model.extend(inputs, x, cache)
        if not self._model_shard.chunks[chunk].stage.last:
            return hidden, cache
        scores = self._forward.collectives.all_scores(model.scores(hidden[:, -1]))
        return tf.cast(scores, tf.float32), cache

    def _sample(
        self, chunk: int, weights: Any, inputs: tf.Tensor, x: Any, cache: Any, uniform: tf.Tensor, rule: SamplingRule
    ) -> tuple[tf.Tensor, Any]:
        output, cache = self._extend(chunk, weights, inputs, x, cache)
        return (choose(output, uniform, rule) if self._model_shard.chunks[chunk].stage.last else output), cache

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
        return [self._read_graph(None, self._forward.features(batch))]

    def _read(self, x: Any) -> Any:
        self._model.bind(self._parameters())
        return self._model.read(x)

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``."""
        return [self._model.select(one, tf.constant(rows)) for one in cache]
