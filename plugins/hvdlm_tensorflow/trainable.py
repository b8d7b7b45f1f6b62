"""A model on this rank: computes, hands its gradients to the exchange bucket by bucket, updates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.axis_groups import Axes, count_traffic
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.pipeline_schedules import kept_micro_batches
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.types import Batch, StepResult, Traffic
from hvdlm_tensorflow.adapters import Adapters
from hvdlm_tensorflow.answers import Answering, features, tensors
from hvdlm_tensorflow.counted_graph import CountedGraph
from hvdlm_tensorflow.memory import Kept
from hvdlm_tensorflow.optimizers import FlatOptimizer


class TensorFlowTrainable(Answering):
    """Parameters lie in one flat variable; a step is one graph, in which buckets travel while others are computed."""

    def __init__(
        self,
        spec: ModelSpec,
        model_shard: ModelShard,
        axes: Axes,
        exchange: Exchange,
        config: Config,
        mesh: Mesh,
        rank: int,
    ) -> None:
        super().__init__(spec, model_shard, axes, count_traffic(axes, exchange), config, rank)
        self._sharded = state = ShardedState(spec, model_shard, exchange, config, mesh, rank)
        self._exchange, self.layout = exchange, state.layout
        initial = state.initial()
        self._flat = tf.Variable(initial)
        self._adapters = Adapters(state, self._trained())
        # What this rank updates: the flat variable itself, or its part of every bucket.
        self._own = self._flat if exchange.zero_size == 1 else tf.Variable(state.update_shard(initial))
        self._gradient = self._make_gradient()
        self._optimizer = FlatOptimizer(
            config.train, self._own, tf.constant(state.update_shard(self.layout.decay_mask()))
        )
        self._carry: dict[int, Any] = {}
        self._kept = Kept()
        self._stage_given: Any = None
        exchange.open(self.layout, initial)
        self._make_graphs()

    def _make_gradient(self) -> Any:
        """Return what micro-batches' gradients add up in: this rank's parts of them, all of them, or nothing."""
        if self._exchange.scatters_every:
            return tf.Variable(tf.zeros_like(self._own), trainable=False)
        several = self._config.train.micro_batch_size is not None or self._model_shard.stage.count > 1
        return tf.Variable(tf.zeros_like(self._flat), trainable=False) if several else None

    def _make_graphs(self) -> None:
        self._accumulate_graph = CountedGraph(self._accumulate, self._counters)
        self._step_graph = CountedGraph(self._step, self._counters)
        self._stage_graph = CountedGraph(self._stage, self._counters)
        self._add_graph = CountedGraph(self._add, self._counters)
        self._finish_graph = CountedGraph(self._finish, self._counters)
        compiled = self._config.train.compile
        self._backward_part = tf.function(self._backward, jit_compile=True) if compiled else self._backward

    def _parameters(self) -> Mapping[str, tf.Tensor]:
        """Return the weights that the model computes with."""
        return self._adapters.bound(self._trained())

    def _trained(self) -> dict[str, tf.Tensor]:
        """Return every parameter as a part of the flat vector."""
        slots, lengths, place = self.layout.slots, [], 0
        for slot in slots:
            lengths += [slot.start - place, slot.stop - slot.start]  # between buckets there may be zeros
            place = slot.stop
        parts = tf.split(self._flat, [*lengths, self.layout.size - place])
        return {s.name: tf.reshape(part, s.shape) for s, part in zip(slots, parts[1::2], strict=True)}

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = math.inf
    ) -> StepResult:
        """Do one optimizer step; see ``interfaces.Trainable``."""
        before = by_axis(self._counters.traffic())
        tokens = sum(batch.tokens for batch in micro_batches)
        figures = tf.constant([learning_rate, step, tokens, limit], tf.float64)
        phase = self._exchange.begin(step)
        if self._gradient is not None:
            self._gradient.assign(tf.zeros_like(self._gradient))
        if self._model_shard.stage.count > 1:
            loss_sum = self._pass_all(micro_batches, step)
            graph, totals = self._finish_graph, self._finish_graph(phase, phase, loss_sum, self._scale(), figures)
        else:
            graph, totals = self._step_graph, self._run_all(micro_batches, step, phase, figures)
        loss_sum_value, total, squared, waited, drained, applied = totals.numpy().tolist()
        self._counters.waited(graph.last, waited)
        norm = squared**0.5
        usable = self._sharded.loss_scale.update(norm)  # fp16 overflows now and then: no step that went wrong
        # A stage that has done its passes waits for the others in the first sum over all stages.
        idle = self._pipeline.waited + drained if self._model_shard.stage.count > 1 else 0.0
        moved = grown(by_axis(self._counters.traffic()), before)
        return StepResult(
            loss_sum_value / total,
            total * self._exchange.stands_for,
            norm,
            waited + idle,
            sum(moved.values()),
            idle_seconds=idle,
            axis_bytes=moved,
            skipped=usable and not applied,
        )

    def _run_all(self, micro_batches: Sequence[Batch], step: int, phase: Hashable, figures: tf.Tensor) -> tf.Tensor:
        """Do a step without stages; return what ``_update`` does."""
        loss_sum = tf.zeros((), tf.float64)
        for number, batch in enumerate(micro_batches[:-1]):
            carry, seed = self._start(number, batch, step)
            given = (features(batch), *tensors(batch), carry, seed, self._scale())
            loss, self._carry[number] = self._accumulate_graph(phase, phase, *given)
            loss_sum += loss
        last = len(micro_batches) - 1
        carry, seed = self._start(last, micro_batches[last], step)
        read = (features(micro_batches[last]), *tensors(micro_batches[last]))
        arguments = (*read, carry, seed, self._scale(), loss_sum, figures)
        totals, self._carry[last] = self._step_graph(phase, phase, *arguments)
        return totals

    def _pass_all(self, micro_batches: Sequence[Batch], step: int) -> tf.Tensor:
        """Do this stage's forward and backward passes; return the sum of losses, float64."""
        loss_sum = tf.zeros((), tf.float64)

        def compute(number: int, batch: Batch, x: tf.Tensor | None) -> tf.Tensor:
            nonlocal loss_sum
            carry, seed = self._start(number, batch, step)
            given = (features(batch) if x is None else x, *tensors(batch), carry, seed, self._scale())
            made, loss, self._carry[number] = self._stage_graph(None, *given)
            self._stage_given = self._stage_given or given
            loss_sum += loss
            return made

        width = self._spec.settings.width
        self._pipeline.run(micro_batches, width, self._flat, compute, lambda gradient: self._add_graph(None, gradient))
        return loss_sum

    def _start(self, number: int, batch: Batch, step: int) -> tuple[Any, tf.Tensor]:
        carry = None if batch.reset else self._carry.get(number)
        carry = self._model.cache(len(batch.inputs)) if carry is None else carry
        words = self._sharded.seed(step, number).generate_state(2, np.uint32).astype(np.int32)
        return carry, tf.constant(words, tf.int32)

    def _scale(self) -> tf.Tensor:
        return tf.constant(self._sharded.loss_scale.value, tf.float32)

    def _stage(
        self, x: Any, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, scale: Any
    ) -> tuple[tf.Tensor, tf.Tensor, Any]:
        """Return what this stage makes (the last: the scaled loss), the sum of losses (float64), the carried state."""
        made, carry = self._losses(self._parameters(), inputs, x, targets, weights, carry, seed, True)
        if not self._model_shard.stage.last:
            return made, tf.zeros((), tf.float64), carry
        scaled = tf.reduce_sum(made) * (scale / self._sharded.loss_divisor)
        return scaled, tf.reduce_sum(tf.cast(made, tf.float64)), carry

    def _backward(
        self, parameters: Any, x: Any, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, scale: Any
    ) -> tuple[tf.Tensor, Any, list[tf.Tensor]]:
        """Return the loss sum (float64), the carried state, and the gradient of every leaf, dense and flat."""
        sources, unused = [parameters[name] for name in self._adapters.leaves], tf.UnconnectedGradients.ZERO
        with self._kept.forward(parameters), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            losses, carry = self._losses(parameters, inputs, x, targets, weights, carry, seed, True)
            scaled = tf.reduce_sum(losses) * (scale / self._sharded.loss_divisor)
        gradients = tape.gradient(scaled, sources, unconnected_gradients=unused)
        self._kept.backward()
        flat = [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]
        return tf.reduce_sum(tf.cast(losses, tf.float64)), carry, flat

    def _buckets(self, of_leaves: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return flat buckets from the gradients of leaves, zeros at their ends where the layout has them."""
        gradients, found = self._adapters.gradients(of_leaves, self._trained()), []
        for index, (first, last) in enumerate(self.layout.buckets):
            rest = self.layout.bucket_range(index)[1] - self.layout.slots[last - 1].stop
            found.append(tf.concat([*gradients[first:last], *([tf.zeros(rest)] if rest else [])], 0))
        return found

    def _cut(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """Return flat buckets of a flat gradient ``[size]``."""
        ranges = [self.layout.bucket_range(i) for i in range(len(self.layout.buckets))]
        return [flat[start:stop] for start, stop in ranges]

    def _accumulate(
        self, phase: Hashable, x: Any, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, scale: Any
    ) -> Any:
        given = (x, inputs, targets, weights, carry, seed, scale)
        loss, carry, gradients = self._backward_part(self._parameters(), *given)
        self._add(tf.concat(self._buckets(gradients), 0))
        return loss, carry

    def _add(self, gradient: tf.Tensor) -> None:
        """Add a micro-batch's gradient ``[size]``, or, where none is kept whole, this rank's part of its sum."""
        if self._exchange.scatters_every:
            handles = [self._exchange.start(bucket, index) for index, bucket in enumerate(self._cut(gradient))]
            gradient = tf.concat([handle.wait() for handle in handles], 0)
        self._gradient.assign_add(gradient)

    def _step(
        self,
        phase: Hashable,
        x: Any,
        inputs: Any,
        targets: Any,
        weights: Any,
        carry: Any,
        seed: Any,
        scale: Any,
        loss_sum: Any,
        figures: Any,
    ) -> tuple[tf.Tensor, Any]:
        """Do the last micro-batch and the update."""
        given = (x, inputs, targets, weights, carry, seed, scale)
        loss, carry, gradients = self._backward_part(self._parameters(), *given)
        buckets = self._buckets(gradients)
        if self._gradient is not None and not self._exchange.scatters_every:
            buckets = [b + before for b, before in zip(buckets, self._cut(self._gradient), strict=True)]
        return self._update(buckets, loss_sum + loss, scale, figures), carry

    def _finish(self, phase: Hashable, loss_sum: Any, scale: Any, figures: Any) -> tf.Tensor:
        """Do the update after all stages' passes."""
        buckets = None if self._exchange.scatters_every else self._cut(tf.identity(self._gradient))
        return self._update(buckets, loss_sum, scale, figures)

    def _update(
        self, buckets: list[tf.Tensor] | None, loss_sum: tf.Tensor, scale: tf.Tensor, figures: tf.Tensor
    ) -> tf.Tensor:
        """Sum the buckets (None: all sums lie in ``self._gradient``) and apply them.

        Returns:
            float64 ``[6]``: the loss sum, tokens and squared gradient norm of the global batch; the seconds waited for
            gradients and for the other stages; 1 where the update was applied.
        """
        exchange = self._exchange
        # Traced first: TensorFlow runs stateful operations (timestamps, collectives of some transports) in the order of
        # the trace, and what follows here waits for all buckets.
        handles = [exchange.start(bucket, index) for index, bucket in enumerate(buckets or [])]
        with tf.control_dependencies(buckets or []):
            # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
            totals = tf.stack([loss_sum, figures[2]])
            ready = tf.timestamp()
        metrics = exchange.start_metrics(totals) if exchange.zero_size == 1 else None
        reduced = [handle.wait() for handle in handles]
        if exchange.scatters_every:
            before = [self._gradient[a:b] for a, b in self._sharded.shard_ranges]
            reduced = [r + b for r, b in zip(reduced, before, strict=True)] if reduced else before
        with tf.control_dependencies(reduced):
            passed = tf.timestamp()
            waited = tf.maximum(passed - ready, 0.0) if exchange.size > 1 else ready * 0.0
        if self._axes.ends is not None:
            for index in self._sharded.tied_buckets:
                reduced[index] = self._axes.ends.all_reduce_async(reduced[index], "tied").wait()
        own = tf.concat(reduced, 0)
        squares = self._squares(own)
        if metrics is None:
            totals = exchange.start_metrics(tf.concat([totals, squares], 0)).wait()
        else:
            totals = tf.concat([metrics.wait(), squares], 0)
        totals = self._over_model(totals)
        with tf.control_dependencies([totals]):
            drained = tf.maximum(tf.timestamp() - passed, 0.0)
        true_scale = self._sharded.loss_divisor / (totals[1] * tf.cast(scale, tf.float64))
        norm = tf.sqrt(totals[2]) * true_scale
        applied = self._apply(own, norm, true_scale, figures)
        with tf.control_dependencies([norm]):
            ready = tf.timestamp()
        replaced = self._replaced()
        if replaced is not None:
            with tf.control_dependencies([replaced]):
                waited += tf.maximum(tf.timestamp() - ready, 0.0)
            self._flat.assign(replaced)
        self._adapters.add(self._trained())
        return tf.stack([totals[0], totals[1], tf.square(norm), waited, drained, tf.cast(applied, tf.float64)])

    def _squares(self, own: tf.Tensor) -> tf.Tensor:
        """Return the squared norm of the gradients that this rank counts, float64 ``[1]``."""
        norms = [tf.cast(tf.norm(own[a:b]), tf.float64) for a, b in self._sharded.norm_ranges]
        return tf.reduce_sum(tf.square(tf.stack(norms)), keepdims=True) if norms else tf.zeros(1, tf.float64)

    def _over_model(self, totals: tf.Tensor) -> tf.Tensor:
        """Return (loss sum, tokens, squared norm) of the whole model from this rank's, float64 ``[3]``."""
        if len(self._axes.model.ranks) == 1:
            return totals
        if not (self._model_shard.stage.last and self._model_shard.index == 0):
            totals *= tf.constant([0.0, 0.0, 1.0], tf.float64)
        return self._axes.model.all_reduce_async(totals, "norm").wait()

    def _replaced(self) -> tf.Tensor | None:
        """Return what the flat vector is replaced by: what all ranks updated, or what the exchange makes of it."""
        if self._exchange.zero_size == 1:
            return self._exchange.finish(self._flat.read_value())
        own = self._own.read_value()
        return tf.concat(self._exchange.gather([own[a:b] for a, b in self._sharded.shard_ranges]), 0)

    def _apply(self, gradient: tf.Tensor, norm: tf.Tensor, scale: tf.Tensor, figures: tf.Tensor) -> tf.Tensor:
        """Rescale, clip and apply the summed gradient, whose ``norm`` is in true scale; return whether it was, bool."""
        clip = self._config.train.clip
        factor = scale * tf.minimum(tf.constant(1.0, tf.float64), clip / (norm + 1e-6)) if clip else scale
        learning_rate, step = tf.cast(figures[0], tf.float32), figures[1]

        def update() -> tf.Tensor:
            self._optimizer.update(gradient * tf.cast(factor, tf.float32), learning_rate, step)
            return tf.constant(True)

        good = tf.math.is_finite(norm) & (norm <= figures[3])
        return tf.cond(good, update, lambda: tf.constant(False))

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter; see ``interfaces.Trainable``."""
        return self._sharded.fingerprints(_host(self._flat))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds; see ``interfaces.Trainable``.

        Of gradients and activations, those that the step's graph makes; of a stage, what a trace of its passes tells,
        for as many micro-batches as the schedule has under way.
        """
        size, own = self.layout.size, int(self._own.shape[0])
        ranges = [self.layout.bucket_range(i) for i in range(len(self.layout.buckets))]
        following = zip(ranges, [*ranges[1:], ranges[-1]], strict=True)
        passing = max(b - a for (a, _), (_, b) in following) if self._exchange.scatters_every else size
        return {
            "parameters": 4 * (size + (own if self._own is not self._flat else 0)) + self._spec.frozen_bytes,
            "gradients": 4 * (passing + (own if self._exchange.zero_size > 1 else 0)),
            "optimizer": sum(4 * int(flat.shape[0]) for flat in self._optimizer.memory.values()),
            "activations": self._activations(),
        }

    def _activations(self) -> int:
        """Return the bytes kept for backward passes, of all micro-batches that are under way at once."""
        stage, train = self._model_shard.stage, self._config.train
        if stage.count == 1:
            return self._kept.bytes
        if self._stage_given is not None and not self._kept.bytes:
            before = self._counters.snapshot()
            tf.function(self._passes).get_concrete_function(*self._stage_given)
            self._counters.restore(before)  # traced, never run
        rows = train.batch_size // self._sharded.mesh.data
        count = rows // (train.micro_batch_size or rows)
        return self._kept.bytes * kept_micro_batches(self._config.parallel.schedule, stage.number, stage.count, count)

    def _passes(self, x: Any, *given: Any) -> list[tf.Tensor]:
        """Return the gradients of a stage's pass, for counting what they read of it."""
        parameters = self._parameters()
        inputs, targets, weights, carry, seed, _ = given
        with self._kept.forward(parameters), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(parameters)
            made, _ = self._losses(parameters, inputs, x, targets, weights, carry, seed, True)
        gradients = tape.gradient(made, list(parameters.values()), output_gradients=tf.ones_like(made))
        self._kept.backward()
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    def traffic(self) -> dict[str, Traffic]:
        """Return what all collectives moved; see ``interfaces.Trainable``."""
        return self._counters.traffic()

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training goes on from; see ``interfaces.Trainable``."""
        memory = {kind: _host(flat) for kind, flat in self._optimizer.memory.items()}
        carry = recurrent_entries([self._model.carry_arrays(self._carry[number]) for number in sorted(self._carry)])
        return self._sharded.arrays(_host(self._flat), memory) | carry

    def shards(self) -> dict[str, Shard]:
        """Return which part of the global array an entry of the state is; see ``interfaces.Trainable``."""
        return self._sharded.shards(self._optimizer.memory)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a state; see ``interfaces.Trainable``."""
        memory = {kind: _host(flat) for kind, flat in self._optimizer.memory.items()}
        flat, memory = self._sharded.restore(state, _host(self._flat), memory)
        self._flat.assign(flat)
        if self._own is not self._flat:
            self._own.assign(self._sharded.update_shard(flat))
        self._adapters.add(self._trained())
        for kind, array in memory.items():
            self._optimizer.memory[kind].assign(array)
        self._carry = self._model.carry_tensors(recurrent_state(state), self._config.train.micro_batch_size)


def _host(variable: tf.Variable) -> np.ndarray:
    """Return a variable's values for reading, not copied where they lie in host memory: ``numpy()`` is slow at that."""
    return np.asarray(memoryview(variable.read_value()))
