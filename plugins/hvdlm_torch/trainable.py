"""A model on this rank: computes, hands its gradients to the exchange bucket by bucket, updates."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.axis_groups import Axes, count_traffic
from hvdlm.parallel.flat_layout import Shard, Slot
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.types import Batch, StepResult, Traffic
from hvdlm_torch.adapters import Adapters
from hvdlm_torch.answers import Answering
from hvdlm_torch.compiler import compiles
from hvdlm_torch.gradients import make_gradients
from hvdlm_torch.memory import kept_bytes
from hvdlm_torch.optimizers import FlatOptimizer


class TorchTrainable(Answering):
    """Parameters are views of one flat vector, which holds this rank's share of the model."""

    def __init__(
        self,
        spec: ModelSpec,
        model_shard: ModelShard,
        axes: Axes,
        exchange: Exchange,
        config: Config,
        device: torch.device,
        mesh: Mesh,
        rank: int,
    ) -> None:
        super().__init__(spec, model_shard, axes, config, device, rank)
        self._sharded = state = ShardedState(spec, model_shard, exchange, config, mesh, rank)
        self._exchange, self.layout = exchange, state.layout
        initial = state.initial()
        self._flat = torch.from_numpy(initial).to(device)
        self._parameters = {slot.name: self._leaf(slot) for slot in self.layout.slots}
        self._adapters = Adapters(state, self._parameters, device)
        self._model.bind(self._adapters.bound)
        self._gradients = make_gradients(self.layout, self._parameters, self._adapters.leaves, exchange, device)
        # What this rank updates: the flat vector itself, or its part of every bucket.
        self._own = self._flat if exchange.zero_size == 1 else torch.from_numpy(state.update_shard(initial)).to(device)
        mask = torch.from_numpy(state.update_shard(self.layout.decay_mask())).to(device)
        self._optimizer = FlatOptimizer(config.train, self._own, self._gradients.own, mask)
        self._counters = count_traffic(axes, exchange)
        self._carry: dict[int, Any] = {}
        self._kept: int | None = None
        compiled = compiles(config.train.compile, device, rank)
        self._forward = torch.compile(self._losses) if compiled else self._losses
        exchange.open(self.layout, initial)

    def _leaf(self, slot: Slot) -> torch.nn.Parameter:
        return torch.nn.Parameter(self._flat[slot.start : slot.stop].view(slot.shape))

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = math.inf
    ) -> StepResult:
        """Do one optimizer step; see ``interfaces.Trainable``."""
        before = by_axis(self._counters.traffic())
        self._exchange.begin(step)
        self._gradients.begin()
        if self._config.model.dropout:
            words = self._sharded.seed(step).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0] >> np.uint64(1)))
        tokens = sum(batch.tokens for batch in micro_batches)
        loss_sum = self._passes(micro_batches)
        totals = torch.stack([loss_sum, loss_sum.new_tensor(tokens)])
        # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
        metrics = self._exchange.start_metrics(totals) if self._exchange.zero_size == 1 else None
        waited, drained = self._gradients.wait(), self._add_tied()
        squares = self._squares()
        if metrics is None:
            metrics = self._exchange.start_metrics(torch.cat([totals, squares]))
            squares = squares.new_zeros(0)
        summed, started = torch.cat([metrics.wait(), squares]), time.perf_counter()
        loss_sum_value, total, squared = self._over_model(summed)
        drained += time.perf_counter() - started
        scale = self._sharded.loss_divisor / (total * self._sharded.loss_scale.value)
        norm = squared**0.5 * scale
        skipped = self._apply(learning_rate, step, norm, scale, limit)
        waited += self._finish()
        self._adapters.add()
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
            skipped=skipped,
        )

    def _passes(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Do all forward and backward passes; return the sum of losses, float64."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        factor = self._sharded.loss_scale.value / self._sharded.loss_divisor

        def compute(number: int, batch: Batch, x: torch.Tensor | None) -> torch.Tensor:
            nonlocal loss_sum
            carry = None if batch.reset else self._carry.get(number)
            x = self._features(batch) if x is None else x
            made, self._carry[number] = self._forward(*self._tensors(batch), x, carry, True)
            if not self._model_shard.stage.last:
                return made.float()
            loss_sum += made.detach().sum(dtype=torch.float64)
            return made.sum() * factor

        if self._model_shard.stage.count > 1:
            width = self._spec.settings.width
            with kept_bytes(self, self._adapters.bound.values()):
                self._pipeline.run(micro_batches, width, compute, self._gradients.micro_batch)
            return loss_sum
        for number, batch in enumerate(micro_batches):
            with kept_bytes(self, self._adapters.bound.values()):
                loss = compute(number, batch, None)
            self._gradients.micro_batch(number + 1 == len(micro_batches))
            loss.backward()
        return loss_sum

    def _add_tied(self) -> float:
        """Add up the gradients of what the first and the last stage both hold; return the seconds that this took."""
        started = time.perf_counter()
        if self._axes.ends is not None:
            for index in self._sharded.tied_buckets:
                own = self._gradients.own[slice(*self._sharded.shard_ranges[index])]
                total = self._axes.ends.all_reduce_async(own, "tied").wait()
                if total.data_ptr() != own.data_ptr():
                    own.copy_(total)
        return time.perf_counter() - started

    @torch.no_grad()
    def _squares(self) -> torch.Tensor:
        """Return the squared norm of the gradients that this rank counts, float64 ``[1]``."""
        norms = [norm for a, b in self._sharded.norm_ranges for norm in _norms(self._gradients.own[a:b])]
        return torch.cat(norms).double().square().sum(0, keepdim=True) if norms else self._flat.new_zeros(1).double()

    def _over_model(self, totals: torch.Tensor) -> list[float]:
        """Return (loss sum, tokens, squared norm) of the whole model from this rank's, float64 ``[3]``."""
        if len(self._axes.model.ranks) > 1:
            if not (self._model_shard.stage.last and self._model_shard.index == 0):
                totals[:2] = 0.0
            totals = self._axes.model.all_reduce_async(totals, "norm").wait()
        return totals.tolist()

    @torch.no_grad()
    def _finish(self) -> float:
        """Gather what other ranks updated, or let the exchange replace it; return the seconds that this took."""
        started = time.perf_counter()
        if self._exchange.zero_size > 1:
            own = [self._own[a:b] for a, b in self._sharded.shard_ranges]
            for index, bucket in enumerate(self._exchange.gather(own)):
                start, stop = self.layout.bucket_range(index)
                self._flat[start:stop].copy_(bucket)
            return time.perf_counter() - started
        replaced = self._exchange.finish(self._flat)
        if replaced is None:
            return 0.0
        self._flat.copy_(replaced)
        return time.perf_counter() - started

    @torch.no_grad()
    def _apply(self, learning_rate: float, step: int, norm: float, scale: float, limit: float) -> bool:
        """Rescale, clip and apply the summed gradient, whose true ``norm`` is given; return whether it is skipped."""
        if not self._sharded.loss_scale.update(norm):
            return False  # fp16 overflows now and then: the scale has been halved
        if not norm <= limit or norm == math.inf:
            return True
        clip = self._config.train.clip
        factor = scale * min(1.0, clip / (norm + 1e-6)) if clip else scale
        if factor != 1.0:
            self._gradients.own.mul_(factor)
        self._optimizer.update(learning_rate, step)
        return False

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter; see ``interfaces.Trainable``."""
        return self._sharded.fingerprints(self._flat.cpu().numpy())

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds; see ``interfaces.Trainable``."""
        own = 0 if self._own is self._flat else 4 * len(self._own)
        return {
            "parameters": 4 * len(self._flat) + own + self._spec.frozen_bytes,
            "gradients": self._gradients.bytes(),
            "optimizer": sum(4 * len(flat) for flat in self._optimizer.memory.values()),
            "activations": self._kept or 0,
        }

    def traffic(self) -> dict[str, Traffic]:
        """Return what all collectives moved; see ``interfaces.Trainable``."""
        return self._counters.traffic()

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training goes on from; see ``interfaces.Trainable``."""
        memory = {kind: flat.cpu().numpy() for kind, flat in self._optimizer.memory.items()}
        carry = recurrent_entries([self._model.carry_arrays(self._carry[number]) for number in sorted(self._carry)])
        return self._sharded.arrays(self._flat.cpu().numpy(), memory) | carry

    def shards(self) -> dict[str, Shard]:
        """Return which part of the global array an entry of the state is; see ``interfaces.Trainable``."""
        return self._sharded.shards(self._optimizer.memory)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a state; see ``interfaces.Trainable``."""
        memory = {kind: flat.cpu().numpy() for kind, flat in self._optimizer.memory.items()}
        flat, memory = self._sharded.restore(state, self._flat.cpu().numpy(), memory)
        self._flat.copy_(torch.from_numpy(flat))
        if self._own is not self._flat:
            self._own.copy_(torch.from_numpy(self._sharded.update_shard(flat)))
        self._adapters.add()
        for kind, array in memory.items():
            self._optimizer.memory[kind].copy_(torch.from_numpy(array))
        micro = self._config.train.micro_batch_size
        self._carry = self._model.carry_tensors(recurrent_state(state), micro, self._device)


def _norms(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of a vector's rows of 1024, and of what is left over.

    torch adds up a long vector on a CPU in a few running sums of its own precision: the norm of 30 M normal numbers
    came out 6e-4 too small, of these rows 2e-10, in the same time.
    """
    whole = len(flat) - len(flat) % 1024
    rest = torch.linalg.vector_norm(flat[whole:]).reshape(1)
    return torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1), rest
