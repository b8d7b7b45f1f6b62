"""A model in training on this rank: forward and backward passes, the sum of gradients over ranks, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import tensorflow as tf

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.moving_average import GATHERED, KIND
from hvdlm.parallel.pipeline_schedules import Action
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.planning.activations import most_kept
from hvdlm.protocols.exchange import Exchange, RestoresState, ShardedExchange
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.types import Batch, StepResult, Traffic
from hvdlm_language.axis_groups import Axes, count_traffic
from hvdlm_language.context_ranks import cut_all
from hvdlm_language.own_parameters import OwnParameters
from hvdlm_tensorflow.adapters import Adapters
from hvdlm_tensorflow.counted_graph import CountedGraph
from hvdlm_tensorflow.forward import Forward
from hvdlm_tensorflow.gathered_layers import GatheredLayers
from hvdlm_tensorflow.gradients import LayerGradients, make_gradients
from hvdlm_tensorflow.inference import Inference
from hvdlm_tensorflow.memory import ActivationMemory
from hvdlm_tensorflow.moving_average import MovingAverage
from hvdlm_tensorflow.muon import Muon
from hvdlm_tensorflow.optimizers import FlatOptimizer
from hvdlm_tensorflow.profiling import Trace, named_range
from hvdlm_tensorflow.slices import replace_elements


class _Pass(NamedTuple):
    """The arguments of one micro-batch's passes, in a graph."""

    x: Any  # features, or the activations of the stage before
    inputs: Any
    targets: Any
    weights: Any
    starts: Any  # of documents
    carry: Any
    seed: Any
    scale: Any  # of the loss, in fp16


class Trainable(Inference):
    """Implements ``Trainable``. Parameters lie in one flat variable, this rank's shard of the model.

    With ZeRO-3, that variable is the rank's shard of every layer, and graphs gather parameters from all ranks'.

    The last micro-batch's passes and the update are one graph, in which buckets travel while others are computed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model_shard: ModelShard,
        axes: Axes,
        exchange: Exchange,
        config: Config,
        mesh: Mesh,
        rank: int,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__(Forward(spec, model_shard, axes, config, rank), count_traffic(axes, exchange))
        self._config = config
        self._exchange = exchange
        self._sharded = state = ShardedState(spec, model_shard, exchange, config, mesh, rank)
        self.layout = state.layout
        gathers = exchange.traits.shards_parameters
        initial = state.initial_shard() if gathers else state.initial()
        self._flat = tf.Variable(initial)
        self._replica = OwnParameters(exchange, self.layout)
        self._own: tf.Tensor | None = None  # the replica's own parameters while the flat variable is the averaged one
        self._layers = GatheredLayers(state, self._flat, self._forward.dtype) if gathers else None
        if self._layers:
            self._gather_in(self._layers)
        self._adapters = self._layers or Adapters(state, self._flat)
        # What this rank updates: the flat variable itself, or its shard of every bucket (ZeRO).
        whole = gathers or exchange.traits.zero_size == 1
        self._updated = self._flat if whole else tf.Variable(state.update_shard(initial))
        # What a checkpoint holds and a rank resumes from: this shard where ranks compute with rounded parameters.
        self._saved = self._updated if exchange.traits.rounds_parameters else self._flat
        self._gradients = make_gradients(state, axes)
        if self._layers:
            assert isinstance(self._gradients, LayerGradients)
            self._layers.sums = self._gradients.take
        rates = state.update_rates()
        self._optimizer: FlatOptimizer | Muon = (
            Muon(config.train, self._updated, rates, state, axes.tensor)
            if state.muon
            else FlatOptimizer(config.train, self._updated, rates, optimizer, in_place=self._layers is not None)
        )
        self._average = MovingAverage(config.train.ema, self._updated) if config.train.ema is not None else None
        # What is saved of every element that this rank updates, by kind.
        self._memory = {**self._optimizer.state, **({KIND: self._average.vector} if self._average else {})}
        self._carry: dict[int, Any] = {}  # by micro-batch: the state that a recurrent model carries to the next step
        self._activations = ActivationMemory()
        self._example_passes: dict[int, _Pass] = {}  # by chunk of a pipeline stage, to be traced by ``memory``
        self._chunk_bytes: list[int] = []  # that one pass of each chunk keeps, as traced
        exchange.open(self.layout, initial)
        self._restoring = exchange if isinstance(exchange, RestoresState) else None
        if self._restoring:
            self._restoring.keep_copies()
        self._accumulate_graph = CountedGraph(self._accumulate, self._counters)
        self._step_graph = CountedGraph(self._step, self._counters)
        compiled = config.train.compile is True
        self._stage_graphs = [
            CountedGraph(partial(self._stage, chunk), self._counters, jit_compile=compiled)
            for chunk in range(len(self._forward.chunks))
        ]
        self._add_graph = CountedGraph(self._gradients.add, self._counters)
        self._finish_graph = CountedGraph(self._finish, self._counters)
        self._exchange_graphs: dict[Callable[..., Any], CountedGraph] = {}
        self._passes = self._backward
        if compiled:
            self._passes = tf.function(self._backward, autograph=False, jit_compile=True)

    def _parameters(self) -> Mapping[str, tf.Tensor]:
        """Return the weights that the model computes with."""
        return self._adapters.bound()

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = math.inf
    ) -> StepResult:
        """Do one optimizer step on this rank's rows of the global batch."""
        self._show_own()
        micro_batches = cut_all(micro_batches, self._forward.context)
        bytes_before = by_axis(self._counters.traffic())
        local_tokens = sum(batch.tokens for batch in micro_batches)
        scalars = tf.constant([learning_rate, step, self._sharded.updates(step), local_tokens, limit], tf.float64)
        phase = self._exchange.begin(step)
        self._gradients.begin()
        staged = self._model_shard.stage.count > 1
        run, graph = (self._run_stage, self._finish_graph) if staged else (self._run_whole, self._step_graph)
        if self._config.communication.reduction == "exact":
            run, graph = self._run_leaves, self._finish_graph
        totals = run(micro_batches, step, phase, scalars)
        loss_sum, tokens, squared, waited, stage_seconds, applied = totals.numpy().tolist()
        self._counters.waited(graph.last, waited)
        waited += self._advance()
        norm = squared**0.5
        usable = self._sharded.loss_scale.update(norm, loss_sum)  # fp16 overflows now and then
        # A stage that has done its passes waits for the others in the first sum over all stages.
        idle = self._pipeline.waited + stage_seconds if staged else 0.0
        axis_bytes = grown(by_axis(self._counters.traffic()), bytes_before)
        return StepResult(
            loss_sum / (tokens or math.nan),  # a step without any is skipped
            tokens * self._exchange.stands_for,
            norm,
            waited + idle,
            sum(axis_bytes.values()),
            idle_seconds=idle,
            axis_bytes=axis_bytes,
            skipped=usable and not applied,
        )

    def _run_whole(self, micro_batches: Sequence[Batch], step: int, phase: Hashable, scalars: tf.Tensor) -> tf.Tensor:
        """Do a step of a rank that has all layers; return what ``_update`` returns."""
        loss_sum = tf.zeros((), tf.float64)
        for number, batch in enumerate(micro_batches[:-1]):
            arguments = self._pass(number, batch, None, step)
            loss, self._carry[number] = self._accumulate_graph(phase, phase, arguments)
            loss_sum += loss
        last = len(micro_batches) - 1
        arguments = self._pass(last, micro_batches[last], None, step)
        totals, self._carry[last] = self._step_graph(phase, phase, arguments, loss_sum, scalars)
        return totals

    def _run_leaves(self, micro_batches: Sequence[Batch], step: int, phase: Hashable, scalars: tf.Tensor) -> tf.Tensor:
        """Do a step of exact sums: one graph computes all micro-batches alike; return what ``_update`` returns."""
        losses = []
        for number, batch in enumerate(micro_batches):
            self._gradients.before_backward(number + 1 == len(micro_batches))
            arguments = self._pass(number, batch, None, step)
            loss, self._carry[number] = self._accumulate_graph(phase, phase, arguments)
            losses.append(loss)
        return self._finish_graph(phase, phase, tf.stack(losses), self._scale(), scalars)

    def _run_stage(self, micro_batches: Sequence[Batch], step: int, phase: Hashable, scalars: tf.Tensor) -> tf.Tensor:
        """Do a step of a pipeline stage; return what ``_update`` returns."""
        loss_sum = tf.zeros((), tf.float64)

        def compute(action: Action, batch: Batch, x: tf.Tensor | None) -> tf.Tensor:
            nonlocal loss_sum
            number, chunk = action.micro_batch, action.chunk
            arguments = self._pass(number, batch, x, step)
            output, loss, self._carry[number] = self._stage_graphs[chunk](None, arguments)
            self._example_passes.setdefault(chunk, arguments)
            loss_sum += loss
            return output

        width = self._spec.settings.width
        self._pipeline.run(micro_batches, width, self._flat, compute, lambda gradient: self._add_graph(None, gradient))
        totals = self._finish_graph(phase, phase, loss_sum, self._scale(), scalars)
        self._pipeline.flush()
        return totals

    def _pass(self, number: int, batch: Batch, x: tf.Tensor | None, step: int) -> _Pass:
        """Return the arguments of micro-batch ``number``'s passes."""
        x = self._forward.features(batch) if x is None else x
        tensors = self._forward.tensors(batch)
        if batch.reset or number not in self._carry:
            carry = self._model.initial_carry(len(batch.inputs))
        else:
            carry = self._carry[number]
        row = self._gradients.row(number)
        seed = self._sharded.seed(step, number) if row is None else self._sharded.seed(step, row=row)
        words = seed.generate_state(2, np.uint32).astype(np.int32)
        return _Pass(x, *tensors, carry, tf.constant(words, tf.int32), self._scale())

    def _scale(self) -> tf.Tensor:
        return tf.constant(self._sharded.loss_scale.value, tf.float32)

    def _losses(self, chunk: int, parameters: Mapping[str, tf.Tensor], arguments: _Pass) -> tuple[tf.Tensor, Any]:
        with named_range("forward"):
            return self._forward.chunks[chunk].losses(parameters, *arguments[:-1])

    def _stage(self, chunk: int, arguments: _Pass) -> tuple[tf.Tensor, tf.Tensor, Any]:
        """Return a stage's activations (the last: the scaled loss), the sum of losses (float64), the carried state."""
        output, carry = self._losses(chunk, self._parameters(), arguments)
        if not self._model_shard.chunks[chunk].stage.last:
            return output, tf.zeros((), tf.float64), carry
        scaled = tf.reduce_sum(output) * (arguments.scale / self._sharded.loss_divisor)
        return scaled, tf.reduce_sum(tf.cast(output, tf.float64)), carry

    def _backward(self, parameters: Mapping[str, tf.Tensor], arguments: _Pass) -> tuple[Any, Any, list[tf.Tensor]]:
        """Return the loss sum (float64), the carried state, and the gradient of every leaf, dense and flat."""
        leaves, unused = [parameters[name] for name in self._adapters.leaves], tf.UnconnectedGradients.ZERO
        with self._activations.forward(parameters), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            losses, carry = self._losses(0, parameters, arguments)
            scaled = tf.reduce_sum(losses) * (arguments.scale / self._sharded.loss_divisor)
        gradients = tape.gradient(scaled, leaves, unconnected_gradients=unused)
        self._activations.backward()
        flat = [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]  # an embedding's gradient is sparse
        return tf.reduce_sum(tf.cast(losses, tf.float64)), carry, flat

    def _buckets(self, of_leaves: list[tf.Tensor]) -> list[tf.Tensor]:
        return self._gradients.pack(self._adapters.gradients(of_leaves))

    def _accumulate(self, phase: Hashable, arguments: _Pass) -> tuple[tf.Tensor, Any]:
        """Do the passes of a micro-batch but the last; ``phase`` has the graph traced anew where collectives differ."""
        loss, carry, gradients = self._passes(self._parameters(), arguments)
        self._gradients.add(tf.concat(self._buckets(gradients), 0))
        return loss, carry

    def _step(self, phase: Hashable, arguments: _Pass, loss_sum: Any, scalars: Any) -> tuple[tf.Tensor, Any]:
        """Do the last micro-batch's passes and the update."""
        loss, carry, gradients = self._passes(self._parameters(), arguments)
        buckets = self._gradients.buckets(self._buckets(gradients))
        return self._update(buckets, loss_sum + loss, arguments.scale, scalars), carry

    def _finish(self, phase: Hashable, loss_sum: Any, scale: Any, scalars: Any) -> tf.Tensor:
        """Do the update after all passes of a stage."""
        return self._update(self._gradients.buckets(None), loss_sum, scale, scalars)

    def _update(self, buckets: list[tf.Tensor], loss_sum: Any, scale: Any, scalars: Any) -> tf.Tensor:
        """Sum the buckets over the ranks and apply them.

        Returns:
            float64 ``[6]``: the loss sum, tokens and squared gradient norm of the global batch; the seconds waited for
            gradients and for the other stages; 1 where the update was applied.
        """
        learning_rate, step, updates, local_tokens, limit = tf.unstack(scalars)
        with named_range("exchange"):
            sums = self._gradients.reduce(buckets, loss_sum, local_tokens)
        total_loss, tokens, squared = tf.unstack(sums.totals)
        # Losses were divided by a constant, not by the step's valid tokens, which all ranks together know only now.
        rescale = self._sharded.loss_divisor / (tokens * tf.cast(scale, tf.float64))
        norm = tf.sqrt(squared) * rescale
        with named_range("update"):
            applied = self._apply(sums.shard, norm, rescale, learning_rate, step, updates, limit)
            if self._restoring:
                self._restoring.settle(applied)
        with named_range("exchange"):
            waited = sums.gradient_seconds + self._replace_parameters(norm)
        self._adapters.add()
        return tf.stack([total_loss, tokens, tf.square(norm), waited, sums.stage_seconds, tf.cast(applied, tf.float64)])

    def _apply(
        self,
        gradient: tf.Tensor,
        norm: tf.Tensor,
        scale: tf.Tensor,
        learning_rate: Any,
        step: Any,
        updates: Any,
        limit: Any,
    ) -> tf.Tensor:
        """Rescale, clip and apply the summed gradient of this rescaled ``norm``; return whether it was applied."""
        clip = self._config.train.clip
        factor = scale * tf.minimum(tf.constant(1.0, tf.float64), clip / (norm + 1e-6)) if clip else scale

        # Outside of the branch, where it is done in the gradient's memory: a branch's inputs are kept for it.
        scaled = gradient * tf.cast(factor, tf.float32)
        rate, optimizer = tf.cast(learning_rate, tf.float32), self._optimizer
        # A branch of a graph can't contain collectives.
        prepared = (optimizer.prepare(scaled),) if isinstance(optimizer, Muon) else ()

        def update() -> tf.Tensor:
            optimizer.update(scaled, rate, updates, *prepared)
            if self._average:
                self._average.update(step)
            return tf.constant(True)

        good = tf.math.is_finite(norm) & (norm <= limit)
        return tf.cond(good, update, lambda: tf.constant(False))

    def _replace_parameters(self, norm: tf.Tensor) -> tf.Tensor | float:
        """Gather the shards that other ranks updated, or what the exchange replaces them by; return the seconds."""
        with tf.control_dependencies([norm]):
            ready = tf.timestamp()
        if self._layers:
            return 0.0
        if self._exchange.traits.zero_size == 1:
            replaced = self._exchange.finish(self._flat.read_value())
            if replaced is None:
                return 0.0
        else:
            replaced = self._gathered()
        with tf.control_dependencies([replaced]):
            waited = tf.maximum(tf.timestamp() - ready, 0.0)
        self._flat.assign(replaced)
        return waited

    def _gathered(self) -> tf.Tensor:
        """Return what the exchange makes of the shards that all ranks updated (ZeRO): the parameters ``[size]``."""
        updated = self._updated.read_value()
        shards = [updated[start:stop] for start, stop in self._sharded.shard_ranges]
        return tf.concat(self._exchange.gather(shards), 0)

    def _advance(self) -> float:
        """Finish and start collectives that stay in flight over several steps; return the seconds waited for them."""
        if self._replica.streams is None:
            return 0.0
        began = time.perf_counter()
        replaced = self._replica.streams.advance(self._flat, self._in_graph)
        for start, values in replaced:
            replace_elements(self._flat, start, values)
        if replaced:
            self._adapters.add()
        return time.perf_counter() - began

    def _in_graph(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the exchange as a graph of its own."""
        if function not in self._exchange_graphs:
            self._exchange_graphs[function] = CountedGraph(
                function, self._counters, jit_compile=self._config.train.compile is True
            )
        return self._exchange_graphs[function](None, *arguments)

    def show_average(self, shown: bool) -> None:
        """Have the model compute with the moving average of its parameters until the next step, or with these again."""
        self._show_own()
        if shown and self._average:
            self._own = tf.identity(self._flat.read_value())
            self._flat.assign(self._gathered_average(self._average.vector.read_value()))
            self._adapters.add()

    def _gathered_average(self, vector: tf.Tensor) -> tf.Tensor:
        """Return the moving average of the flat vector, of which this rank updates ``vector``."""
        if self._layers or self._exchange.traits.zero_size == 1:  # the former are gathered as they are used
            return vector
        exchange, ranges = cast(ShardedExchange, self._exchange), self._sharded.shard_ranges
        started = [exchange.gather_vector(vector[a:b], index, GATHERED) for index, (a, b) in enumerate(ranges)]
        return tf.concat([handle.wait() for handle in started], 0)

    def _show_averaged(self) -> None:
        """Have the model compute with the averaged parameters until the next step, where replicas never agree."""
        averaged = self._replica.streams.averaged() if self._replica.streams and self._own is None else None
        if averaged is not None:
            self._rounded = None
            self._own = tf.identity(self._flat.read_value())
            self._flat.assign(averaged)
            self._adapters.add()

    def _show_own(self) -> None:
        """Have the model compute with this replica's own parameters again, which may change now."""
        self._rounded = None
        if self._own is not None:
            self._flat.assign(self._own)
            self._own = None
            self._adapters.add()

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter, by global name."""
        return self._sharded.fingerprints(self._replica.averaged(_host(self._flat)))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds for parameters, gradients, optimizer and activations."""
        shard = 0 if self._updated is self._flat else int(self._updated.shape[0])
        gathered = self._layers.bytes() if self._layers else 0
        return {
            "parameters": 4 * (int(self._flat.shape[0]) + shard) + gathered + self._spec.frozen_bytes,
            "gradients": self._gradients.bytes(),
            "optimizer": sum(4 * int(flat.shape[0]) for flat in self._memory.values()),
            "activations": self._activation_bytes(),
        }

    def _activation_bytes(self) -> int:
        """Return the bytes kept for backward passes, of all micro-batches under way at once."""
        train, stage = self._config.train, self._model_shard.stage
        if stage.count == 1:
            return self._activations.bytes
        if not self._chunk_bytes:
            before = self._counters.snapshot()
            for chunk, arguments in sorted(self._example_passes.items()):
                traced = ActivationMemory()
                traced.trace(self._parameters, partial(self._losses, chunk), arguments)
                self._chunk_bytes.append(traced.bytes)
            self._counters.restore(before)  # traced, never run
        rows = train.batch_size // self._sharded.mesh.data
        count, each = rows // (train.micro_batch_size or rows), self._chunk_bytes or [0] * len(self._forward.chunks)
        return most_kept(self._config.parallel.schedule, stage.number, stage.count, count, each)

    def device_memory_peak(self) -> int | None:
        """Return the most bytes of the GPU's memory that this rank's tensors took at once; None: it has no GPU."""
        visible = tf.config.get_visible_devices("GPU")
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] if visible else None

    def start_trace(self) -> Trace:
        """Start to record what this process computes."""
        return Trace()

    def traffic(self) -> dict[str, Traffic]:
        """Return the calls, bytes and seconds of this rank's collectives so far, by ``purpose/operation``."""
        return self._counters.traffic()

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all that training resumes from, under global names."""
        self._show_own()
        own = _host(self._saved)
        memory = {kind: _host(flat) for kind, flat in self._memory.items()}
        carry = recurrent_entries([self._model.carry_arrays(self._carry[number]) for number in sorted(self._carry)])
        return self._sharded.arrays(self._replica.averaged(own), memory) | self._replica.entries(own) | carry

    def shards(self) -> dict[str, Shard]:
        """Return which box of the global array every entry of ``state()`` is."""
        return self._sharded.shards(self._memory)

    def replicas(self, names: Collection[str]) -> dict[str, str]:
        """Return the identities of entries of ``state()`` and of frozen weights that other ranks may hold too."""
        return self._sharded.replicas(names, self._memory)

    def frozen(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the present values of every frozen base weight."""
        return self._adapters.frozen_arrays()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace parameters, optimizer, exchange and carried state by those of ``state``."""
        memory = {kind: _host(flat) for kind, flat in self._memory.items()}
        flat, memory = self._sharded.restore(state, _host(self._saved), memory)
        self._own = self._rounded = None
        self._saved.assign(flat)
        if self._exchange.traits.rounds_parameters:
            self._flat.assign(self._gathered())
        elif self._updated is not self._flat:
            self._updated.assign(self._sharded.update_shard(flat))
        self._adapters.add()
        for kind, array in memory.items():
            self._memory[kind].assign(array)
        self._carry = self._model.carry_tensors(recurrent_state(state), self._config.train.micro_batch_size)


def _host(variable: tf.Variable) -> np.ndarray:
    """Return a variable's values for reading, not copied where they lie in host memory: ``numpy()`` is slow at that."""
    return np.asarray(memoryview(variable.read_value()))
