"""A model in training on this rank: gradients, their sum over the ranks, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.types import Batch, StepResult, Traffic
from hvdlm.protocols.world import World
from hvdlm_jax import optimizers
from hvdlm_jax.forward import Forward, Parameters, Tokens, tokens_of
from hvdlm_jax.inference import Inference
from hvdlm_language.axis_groups import count_traffic, make_axes

Buckets = tuple[jax.Array, ...]


class Trainable(Inference):
    """Implements ``Trainable``. The parameters are one flat vector ``[size]``; a step runs three compiled functions.

    Those are ``_backward`` (a micro-batch's gradients, in buckets), ``_squared_norm`` and ``_update``. Between them,
    Python hands the buckets to the exchange.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        world: World,
        exchange: Exchange,
        config: Config,
        optimizer: Optimizer | None = None,
    ) -> None:
        model_shard = make_model_shard(spec, mesh, world.rank, config.parallel)
        self._sharded = state = ShardedState(spec, model_shard, exchange, config, mesh, world.rank)
        self.layout = state.layout
        self._config = config
        self._exchange = exchange
        self._optimizer = optimizer  # of a plugin; None: one of those in optimizers.py
        self._counters = count_traffic(make_axes(world, mesh, model_shard), exchange)
        initial = state.initial()
        frozen = {name: jnp.asarray(array) for name, array in state.initial_frozen()}
        super().__init__(Forward(spec, self.layout, config), jnp.array(initial), frozen)
        # What this rank updates: all parameters, or with ZeRO its shard of every bucket.
        self._updated = self._flat if exchange.traits.zero_size == 1 else jnp.array(state.update_shard(initial))
        self._mask = jnp.asarray(state.update_shard(self.layout.decay_mask()))
        self._memory = optimizers.initial_memory(config.train, len(self._mask), optimizer)
        self._carry: dict[int, Any] = {}  # by micro-batch: the state that a recurrent model carries to the next step
        self._backward = jax.jit(self._trace_backward, donate_argnums=(2,))
        self._squared_norm = jax.jit(_trace_squared_norm)
        # The parameters are not donated: exchanges keep what they were given or returned (local SGD, DiLoCo).
        self._update = jax.jit(self._trace_update, donate_argnums=(1,))
        self._add = jax.jit(_trace_sums, donate_argnums=(0,))
        self._divide = jax.jit(self._trace_shards)
        exchange.open(self.layout, initial)

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = math.inf
    ) -> StepResult:
        """Do one optimizer step on this rank's rows of the global batch."""
        bytes_before = by_axis(self._counters.traffic())
        self._exchange.begin(step)
        buckets, totals = self._gradients(micro_batches, step)
        began = time.perf_counter()
        gradient, (loss_sum, tokens, squared) = self._reduce(buckets, totals)
        waited = time.perf_counter() - began
        # Losses were divided by a constant, not by the step's valid tokens, which all ranks together know only now.
        counted = tokens or math.nan  # a step without any is skipped
        scale = self._sharded.loss_divisor / counted
        norm = math.sqrt(squared) * scale if squared >= 0 else math.nan
        applied = norm <= limit and norm != math.inf  # in this form, NaN is skipped too
        if applied:
            self._apply(gradient, learning_rate, step, norm, scale)
        began = time.perf_counter()
        self._replace_parameters()
        waited += time.perf_counter() - began if self._exchange.traits.size > 1 else 0.0
        axis_bytes = grown(by_axis(self._counters.traffic()), bytes_before)
        return StepResult(
            loss_sum / counted,
            tokens * self._exchange.stands_for,
            norm,
            waited,
            sum(axis_bytes.values()),
            axis_bytes=axis_bytes,
            skipped=not applied,
        )

    def _gradients(self, micro_batches: Sequence[Batch], step: int) -> tuple[Buckets, jax.Array]:
        """Return the gradients of all micro-batches, in buckets, and float64 (loss sum, valid tokens)."""
        buckets, totals = None, np.zeros(2)
        for number, batch in enumerate(micro_batches):
            if batch.reset or number not in self._carry:
                self._carry[number] = self._forward.model.initial_carry(len(batch.inputs))
            seed = self._sharded.seed(step, number).generate_state(2)
            new, totals, self._carry[number] = self._backward(
                self._flat, self._frozen, totals, tokens_of(batch), self._carry[number], seed
            )
            if self._exchange.traits.scatters_every:  # ZeRO-2: a rank keeps the sums of its shards
                new = self._exchanged(new)
            buckets = new if buckets is None else self._add(buckets, new)
        # JAX returns before it has computed: without this, the exchange would seem to take that time.
        return jax.block_until_ready((buckets, totals))

    def _exchanged(self, buckets: Buckets) -> Buckets:
        """Return this rank's shards of the sums of ``buckets`` over the data ranks."""
        handles = [self._exchange.start(bucket, index) for index, bucket in enumerate(buckets)]
        return tuple(handle.wait() for handle in handles)

    def _reduce(self, buckets: Buckets, totals: jax.Array) -> tuple[Buckets, list[float]]:
        """Return the summed gradients, and (loss sum, valid tokens, squared norm) of the global batch."""
        # With ZeRO a rank has the norm of its shard only, which is summed with the metrics.
        metrics = self._exchange.start_metrics(totals) if self._exchange.traits.zero_size == 1 else None
        gradient = buckets if self._exchange.traits.scatters_every else self._exchanged(buckets)
        squared = self._squared_norm(gradient)
        if metrics is None:
            return gradient, self._exchange.start_metrics(jnp.concatenate([totals, squared])).wait().tolist()
        return gradient, [*metrics.wait().tolist(), float(squared[0])]

    def _apply(self, gradient: Buckets, learning_rate: float, step: int, norm: float, scale: float) -> None:
        """Rescale, clip and apply the summed gradient of this rescaled ``norm``."""
        clip = self._config.train.clip
        factor = scale * min(1.0, clip / (norm + 1e-6)) if clip else scale
        rates = optimizers.rates(self._config.train, learning_rate, self._sharded.updates(step), factor)
        self._updated, self._memory = self._update(self._updated, self._memory, gradient, self._mask, rates)

    def _replace_parameters(self) -> None:
        """Gather the shards that other ranks updated, or take what the exchange replaces the parameters by."""
        if self._exchange.traits.zero_size > 1:
            self._flat = jnp.concatenate(self._exchange.gather(self._divide(self._updated)))
            return
        replaced = self._exchange.finish(self._updated)
        self._updated = self._updated if replaced is None else replaced
        self._flat = self._updated

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter, by global name."""
        return self._sharded.fingerprints(np.asarray(self._flat))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds; those of activations, which XLA allocates itself, are unknown: 0."""
        shard = 0 if self._exchange.traits.zero_size == 1 else len(self._updated)
        return {
            "parameters": 4 * (self.layout.size + shard) + self._forward.spec.frozen_bytes,
            "gradients": 4 * (self.layout.size + shard),
            "optimizer": sum(4 * len(flat) for flat in self._memory.values()),
            "activations": 0,
        }

    def traffic(self) -> dict[str, Traffic]:
        """Return the calls, bytes and seconds of this rank's collectives so far, by ``purpose/operation``."""
        return self._counters.traffic()

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all that training resumes from, under global names."""
        carry = recurrent_entries([_carry_arrays(self._carry[number]) for number in sorted(self._carry)])
        return self._sharded.arrays(np.asarray(self._flat), self._memory_arrays()) | carry

    def _memory_arrays(self) -> dict[str, np.ndarray]:
        return {kind: np.asarray(flat) for kind, flat in self._memory.items()}

    def shards(self) -> dict[str, Shard]:
        """Return which box of the global array every entry of ``state()`` is."""
        return self._sharded.shards(self._memory)

    def replicas(self, names: Collection[str]) -> dict[str, str]:
        """Return the identities of entries of ``state()`` and of frozen weights that other ranks may hold too."""
        return self._sharded.replicas(names, self._memory)

    def frozen(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the present values of every frozen base weight."""
        return ((f"frozen/{name}", np.asarray(array)) for name, array in self._frozen.items())

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace parameters, optimizer, exchange and carried state by those of ``state``."""
        flat, memory = self._sharded.restore(state, np.asarray(self._flat), self._memory_arrays())
        self._flat = jnp.array(flat)
        whole = self._exchange.traits.zero_size == 1
        self._updated = self._flat if whole else jnp.array(self._sharded.update_shard(flat))
        self._memory = {kind: jnp.array(array) for kind, array in memory.items()}
        self._carry = self._carry_of(recurrent_state(state))

    def _carry_of(self, arrays: Mapping[str, np.ndarray]) -> dict[int, Any]:
        """Return the carried state of every micro-batch from that of all rows, by ``layer.index``."""
        if not arrays:
            return {}
        rows = len(next(iter(arrays.values())))
        size = self._config.train.micro_batch_size or rows
        names = [[f"{i}.{j}" for j in range(len(s))] for i, s in enumerate(self._forward.model.initial_carry(1))]
        return {
            number: [tuple(jnp.asarray(arrays[name][start : start + size]) for name in layer) for layer in names]
            for number, start in enumerate(range(0, rows, size))
        }

    def _trace_backward(
        self,
        flat: jax.Array,
        frozen: Parameters,
        totals: jax.Array,
        batch: Tokens,
        carry: Any,
        seed: jax.Array,
    ) -> tuple[Buckets, jax.Array, Any]:
        """Return a micro-batch's gradients, ``totals`` with its sums added, and the new carry."""

        def mean(trained: Parameters) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            key = jax.random.wrap_key_data(seed, impl="threefry2x32")
            losses, after = self._forward.losses(self._forward.weights(trained, frozen), batch, carry, key)
            return losses.sum() / self._sharded.loss_divisor, (losses.sum(dtype=jnp.float64), after)

        gradients, (loss_sum, after) = jax.grad(mean, has_aux=True)(self._forward.parameters(flat))
        weights = batch.weights
        tokens = np.float64(batch.targets.size) if weights is None else weights.sum(dtype=jnp.float64)
        return self._in_buckets(gradients), totals + jnp.stack([loss_sum, tokens]), after

    def _in_buckets(self, gradients: Parameters) -> Buckets:
        """Return the flat buckets of the layout, each padded to its length."""
        buckets = []
        for index, (first, last) in enumerate(self.layout.buckets):
            flat = jnp.concatenate([gradients[slot.name].reshape(-1) for slot in self.layout.slots[first:last]])
            start, stop = self.layout.bucket_range(index)
            buckets.append(jnp.pad(flat, (0, stop - start - len(flat))))
        return tuple(buckets)

    def _trace_update(
        self, x: jax.Array, memory: optimizers.Memory, gradient: Buckets, mask: jax.Array, rates: jax.Array
    ) -> tuple[jax.Array, optimizers.Memory]:
        return optimizers.update(self._config.train, x, memory, jnp.concatenate(gradient), mask, rates, self._optimizer)

    def _trace_shards(self, updated: jax.Array) -> Buckets:
        """Return this rank's shard of every bucket, of the vector that it updates."""
        return tuple(updated[start:stop] for start, stop in self._sharded.shard_ranges)


def _trace_squared_norm(gradient: Buckets) -> jax.Array:
    """Return the sum of all squares, float64 ``[1]``."""
    return sum(jnp.square(bucket.astype(jnp.float64)).sum() for bucket in gradient).reshape(1)


def _trace_sums(buckets: Buckets, new: Buckets) -> Buckets:
    return tuple(bucket + more for bucket, more in zip(buckets, new, strict=True))


def _carry_arrays(carry: Any) -> dict[str, np.ndarray]:
    """Return {layer.index: float32 ``[rows, hidden]``} of a carried state; empty where there is none."""
    states = enumerate(carry or [])
    return {f"{i}.{j}": np.asarray(array) for i, state in states for j, array in enumerate(state)}
