"""A model in training on this rank: forward and backward passes, the sum of gradients over ranks, the update."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.moving_average import GATHERED, KIND
from hvdlm.parallel.pipeline_schedules import Action
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.exchange import Exchange, RestoresState, ShardedExchange
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.types import Batch, StepResult, Traffic
from hvdlm_language.axis_groups import Axes, count_traffic
from hvdlm_language.context_ranks import cut_all
from hvdlm_language.own_parameters import OwnParameters
from hvdlm_torch import compiler
from hvdlm_torch.activation_offload import ActivationOffload, OffloadedLayers
from hvdlm_torch.adapters import Adapters
from hvdlm_torch.figures import DeviceResult, Figures
from hvdlm_torch.forward import Forward
from hvdlm_torch.gathered_layers import GatheredLayers
from hvdlm_torch.gradients import make_gradients
from hvdlm_torch.inference import Inference
from hvdlm_torch.memory import ActivationMemory
from hvdlm_torch.moving_average import MovingAverage
from hvdlm_torch.muon import Muon
from hvdlm_torch.optimizers import FlatOptimizer
from hvdlm_torch.profiling import Trace, named_range


class Trainable(Inference):
    """Implements ``Trainable``. Parameters are views of one flat vector, this rank's shard of the model.

    With ZeRO-3, that vector is the rank's shard of every layer, and parameters are gathered from all ranks' while a
    layer computes.
    """

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
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__(Forward(spec, model_shard, axes, config, device, rank))
        self._config = config
        self._exchange = exchange
        self._sharded = state = ShardedState(spec, model_shard, exchange, config, mesh, rank)
        self.layout = state.layout
        gathers = exchange.traits.shards_parameters
        initial = state.initial_shard() if gathers else state.initial()
        # A copy, which begins at a multiple of 64 bytes: the bits of products may depend on where a matrix begins.
        self._flat = torch.tensor(initial, device=device)
        self._replica = OwnParameters(exchange, self.layout)
        self._own: torch.Tensor | None = None  # the replica's own parameters while the flat vector is the averaged one
        self._layers = GatheredLayers(state, self._flat) if gathers else None
        parameters = self._layers.parameters if self._layers else self._views()
        self._adapters = Adapters(state, parameters, device)
        for chunk in self._forward.chunks:
            chunk.model.bind(self._adapters.bound)
        if self._layers:
            self._gather_in(self._layers)
        self._gradients = make_gradients(state, axes, parameters, self._adapters.leaves, device, self._layers)
        # What this rank updates: the flat vector itself, or its shard of every bucket (ZeRO).
        self._updated = (
            self._flat
            if gathers or exchange.traits.zero_size == 1
            else torch.from_numpy(state.update_shard(initial)).to(device)
        )
        # What a checkpoint holds and a rank resumes from: this shard where ranks compute with rounded parameters.
        self._saved = self._updated if exchange.traits.rounds_parameters else self._flat
        vectors = self._updated, self._gradients.shard, state.update_rates()
        self._optimizer: FlatOptimizer | Muon = (
            Muon(config.train, *vectors, state, axes.tensor)
            if state.muon
            else FlatOptimizer(config.train, *vectors, optimizer)
        )
        self._average = MovingAverage(config.train.ema, self._updated) if config.train.ema is not None else None
        # What is saved of every element that this rank updates, by kind.
        self._memory = {**self._optimizer.state, **({KIND: self._average.vector} if self._average else {})}
        self._counters = count_traffic(axes, exchange)
        self._carry: dict[int, Any] = {}  # by micro-batch: the state that a recurrent model carries to the next step
        self._activations = ActivationMemory()
        if config.train.activation_offload:
            self._offload()
        losses: list[Any] = [chunk.losses for chunk in self._forward.chunks]
        self._losses = [compiler.compiled(one) for one in losses] if config.train.compile is True else losses
        exchange.open(self.layout, initial)
        self._restoring = exchange if isinstance(exchange, RestoresState) else None
        if self._restoring:
            self._restoring.keep_copies()

    def _offload(self) -> None:
        """Have what the layers of all chunks keep for backward passes wait on the host."""
        self._activations.offload = offload = ActivationOffload(self._device, self._activations.count)
        for chunk in self._forward.chunks:
            model: Any = chunk.model
            model.layers = OffloadedLayers(model.layers, chunk.model_shard, offload)

    def _views(self) -> dict[str, torch.nn.Parameter]:
        return {s.name: torch.nn.Parameter(self._flat[s.start : s.stop].view(s.shape)) for s in self.layout.slots}

    def _parameters(self) -> Mapping[str, torch.Tensor]:
        """Return the weights that the model computes with."""
        return self._adapters.bound

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = math.inf
    ) -> StepResult:
        """Do one optimizer step on this rank's rows of the global batch."""
        self._show_own()
        micro_batches = cut_all(micro_batches, self._forward.context)
        bytes_before = by_axis(self._counters.traffic())
        self._exchange.begin(step)
        self._gradients.begin()
        self._seed_dropout(step, None)
        losses = self._backward(micro_batches, step)
        with named_range("exchange"):
            sums = self._gradients.reduce(losses, sum(batch.tokens for batch in micro_batches))
        self._pipeline.flush()
        # From here to the figures, scalars are float64 tensors on the device.
        loss_sum, tokens, squared = sums.totals.unbind()
        # Losses were divided by a constant, not by the step's valid tokens, which all ranks together know only now.
        counted = tokens.where(tokens > 0, math.nan)  # a step without any is skipped
        scale = self._sharded.loss_divisor / (counted * self._sharded.loss_scale.value)
        norm = squared.sqrt() * scale
        applied = norm <= min(limit, sys.float_info.max)  # not where it is NaN or infinite
        figures = Figures(torch.stack([loss_sum / counted, tokens, norm, applied]))
        with named_range("update"):
            self._optimizer.update(learning_rate, self._sharded.updates(step), self._factor(norm, scale), applied)
            if self._average:
                self._average.update(step, applied)
            if self._restoring:
                self._restoring.settle(applied)
        with named_range("exchange"):
            waited = sums.gradient_seconds + self._replace_parameters() + self._advance()
        self._adapters.add()
        # A stage that has done its passes waits for the others in the first sum over all stages.
        idle = self._pipeline.waited + sums.stage_seconds if self._model_shard.stage.count > 1 else 0.0
        axis_bytes = grown(by_axis(self._counters.traffic()), bytes_before)
        result = DeviceResult(figures, self._exchange.stands_for, waited + idle, sum(axis_bytes.values()))
        result.idle_seconds, result.axis_bytes = idle, axis_bytes
        if self._sharded.loss_scale.active:  # fp16 overflows now and then; the next step needs the scale: this waits
            usable = self._sharded.loss_scale.update(result.grad_norm, result.loss)
            result.skipped = usable and result.skipped
        return result

    def _seed_dropout(self, step: int, row: int | None) -> None:
        """Have masks follow from the step, as in a run that was not resumed, and from the rank, or from ``row``."""
        if self._config.model.dropout:
            seed = self._sharded.seed(step, row=row).generate_state(1, np.uint64)[0]
            self._forward.masks.seed(int(seed >> np.uint64(1)))

    def _backward(self, micro_batches: Sequence[Batch], step: int) -> list[torch.Tensor]:
        """Do all forward and backward passes; return each micro-batch's sum of losses, float64, in the last stage."""
        losses: list[torch.Tensor] = []
        factor = self._sharded.loss_scale.value / self._sharded.loss_divisor
        masks = self._forward.masks.forward if self._config.model.dropout else nullcontext

        def compute(action: Action, batch: Batch, x: torch.Tensor | None) -> torch.Tensor:
            number, chunk = action.micro_batch, action.chunk
            x = self._forward.features(batch) if x is None else x
            if (row := self._gradients.row(number)) is not None:
                self._seed_dropout(step, row)
            tensors = self._forward.tensors(batch)
            with named_range("forward"), masks():
                output, self._carry[number] = self._losses[chunk](x, *tensors, self._carry_into(number, batch))
            if not self._model_shard.chunks[chunk].stage.last:
                return output.float()  # the pipeline sends them in the precision of the step
            losses.append(output.detach().sum(dtype=torch.float64))
            return output.sum() * factor

        bound = self._adapters.bound.values()
        if self._model_shard.stage.count > 1:
            width = self._spec.settings.width
            with self._activations.forward(bound):
                self._pipeline.run(micro_batches, width, compute, self._gradients.before_backward)
            return losses
        for number, batch in enumerate(micro_batches):
            with self._activations.forward(bound, self._layers.addresses if self._layers else ()):
                loss = compute(Action("forward", number), batch, None)
            self._gradients.before_backward(number + 1 == len(micro_batches))
            with named_range("backward"):
                loss.backward()
        return losses

    def _carry_into(self, number: int, batch: Batch) -> Any:
        """Return the state with which a recurrent model starts micro-batch ``number``."""
        if batch.reset or number not in self._carry:
            return self._model.initial_carry(len(batch.inputs), self._device)
        return self._carry[number]

    def _factor(self, norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the factor that rescales the summed gradient, of this rescaled ``norm``, and clips it."""
        clip = self._config.train.clip
        return scale * (clip / (norm + 1e-6)).clamp(max=1.0) if clip else scale

    @torch.no_grad()
    def _replace_parameters(self) -> float:
        """Gather the shards that other ranks updated, or what the exchange replaces them by; return the seconds."""
        began = time.perf_counter()
        if self._layers:
            return 0.0
        if self._exchange.traits.zero_size > 1:
            self._gather()
            return time.perf_counter() - began
        replaced = self._exchange.finish(self._flat)
        if replaced is None:
            return 0.0
        self._flat.copy_(replaced)
        return time.perf_counter() - began

    @torch.no_grad()
    def _gather(self) -> None:
        """Replace the parameters by what the exchange makes of the shards that all ranks updated (ZeRO)."""
        shards = [self._updated[start:stop] for start, stop in self._sharded.shard_ranges]
        for index, bucket in enumerate(self._exchange.gather(shards)):
            start, stop = self.layout.bucket_range(index)
            self._flat[start:stop].copy_(bucket)

    @torch.no_grad()
    def _advance(self) -> float:
        """Finish and start collectives that stay in flight over several steps; return the seconds waited for them."""
        if self._replica.streams is None:
            return 0.0
        began = time.perf_counter()
        for start, values in self._replica.streams.advance(self._flat):
            self._flat[start : start + len(values)].copy_(values)
        return time.perf_counter() - began

    @torch.no_grad()
    def show_average(self, shown: bool) -> None:
        """Have the model compute with the moving average of its parameters until the next step, or with these again."""
        self._show_own()
        if shown and self._average:
            self._own = self._flat.clone()
            self._flat.copy_(self._gathered_average(self._average.vector))
            self._adapters.add()

    def _gathered_average(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the moving average of the flat vector, of which this rank updates ``vector``."""
        if self._layers or self._exchange.traits.zero_size == 1:  # the former are gathered as they are used
            return vector
        exchange, ranges = cast(ShardedExchange, self._exchange), self._sharded.shard_ranges
        started = [exchange.gather_vector(vector[a:b], index, GATHERED) for index, (a, b) in enumerate(ranges)]
        return torch.cat([handle.wait() for handle in started])

    @torch.no_grad()
    def _show_averaged(self) -> None:
        """Have the model compute with the averaged parameters until the next step, where replicas never agree."""
        averaged = self._replica.streams.averaged() if self._replica.streams and self._own is None else None
        if averaged is not None:
            self._rounded = None
            self._own = self._flat.clone()
            self._flat.copy_(torch.from_numpy(averaged))
            self._adapters.add()

    @torch.no_grad()
    def _show_own(self) -> None:
        """Have the model compute with this replica's own parameters again, which may change now."""
        self._rounded = None
        if self._own is not None:
            self._flat.copy_(self._own)
            self._own = None
            self._adapters.add()

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter, by global name."""
        return self._sharded.fingerprints(self._replica.averaged(self._flat.cpu().numpy()))

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds for parameters, gradients, optimizer and activations."""
        shard = 0 if self._updated is self._flat else len(self._updated)
        gathered = self._layers.held.at_peak["parameters"] if self._layers else 0
        return {
            "parameters": 4 * (len(self._flat) + shard) + gathered + self._spec.frozen_bytes,
            "gradients": self._gradients.bytes(),
            "optimizer": sum(4 * len(flat) for flat in self._memory.values()),
            "activations": self._activations.bytes,
        }

    def device_memory_peak(self) -> int | None:
        """Return the most bytes of the GPU's memory that this rank's tensors took at once; None: it has no GPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def start_trace(self) -> Trace:
        """Start to record what this process computes."""
        return Trace()

    def traffic(self) -> dict[str, Traffic]:
        """Return the calls, bytes and seconds of this rank's collectives so far, by ``purpose/operation``."""
        return self._counters.traffic()

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all that training resumes from, under global names."""
        self._show_own()
        own = self._saved.cpu().numpy()
        memory = {kind: flat.cpu().numpy() for kind, flat in self._memory.items()}
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

    @torch.no_grad()
    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace parameters, optimizer, exchange and carried state by those of ``state``."""
        memory = {kind: flat.cpu().numpy() for kind, flat in self._memory.items()}
        flat, memory = self._sharded.restore(state, self._saved.cpu().numpy(), memory)
        self._own = self._rounded = None
        self._saved.copy_(torch.from_numpy(flat))
        if self._exchange.traits.rounds_parameters:
            self._gather()
        elif self._updated is not self._flat:
            self._updated.copy_(torch.from_numpy(self._sharded.update_shard(flat)))
        self._adapters.add()
        for kind, array in memory.items():
            self._memory[kind].copy_(torch.from_numpy(array))
        micro_rows = self._config.train.micro_batch_size
        self._carry = self._model.carry_tensors(recurrent_state(state), micro_rows, self._device)
