"""A model on this rank: computes, hands its gradients to the exchange bucket by bucket, updates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvdlm.config import Config
from hvdlm.exchange import total_bytes
from hvdlm.interfaces import Batch, Exchange, Handle, HvdlmError, StepResult
from hvdlm.models.layout import Slot, make_layout
from hvdlm.models.spec import ModelSpec
from hvdlm_torch.optimizers import FlatOptimizer

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchTrainable:
    """Parameters and gradients are views of two flat vectors; a bucket of gradients is a range of one of them."""

    def __init__(
        self, spec: ModelSpec, model: Any, exchange: Exchange, config: Config, device: torch.device, place: int
    ) -> None:
        self._model, self._exchange, self._config, self._device, self._place = model, exchange, config, device, place
        self.layout = make_layout(spec.params, config.communication.bucket_bytes)
        self._flat = torch.from_numpy(self.layout.flatten(spec.initial(config.train.seed))).to(device)
        self._gradient = torch.zeros_like(self._flat)
        mask = torch.from_numpy(self.layout.decay_mask()).to(device)
        self._optimizer = FlatOptimizer(config.train, self._flat, self._gradient, mask)
        self._parameters = {slot.name: self._leaf(slot) for slot in self.layout.slots}
        model.bind(self._parameters)
        self._normaliser = float(config.train.batch_size * config.data.context)
        self._carry: dict[int, Any] = {}
        self._eval_carry: Any = None
        self._handles: dict[int, Handle] = {}
        self._missing: list[int] | None = None
        self._scale, self._steps_unscaled = (2.0**16 if config.train.precision == "fp16" else 1.0), 0
        self._forward = torch.compile(self._losses) if config.train.compile else self._losses
        exchange.open(self.layout, self._flat.cpu().numpy())
        if exchange.size > 1:
            self._start_early()

    def _leaf(self, slot: Slot) -> torch.nn.Parameter:
        leaf = torch.nn.Parameter(self._flat[slot.start : slot.stop].view(slot.shape))
        leaf.grad = self._gradient[slot.start : slot.stop].view(slot.shape)
        return leaf

    def _start_early(self) -> None:
        """Let a bucket travel as soon as its last gradient is there, while the backward pass goes on."""
        for index, (first, last) in enumerate(self.layout.buckets):
            for slot in self.layout.slots[first:last]:
                self._parameters[slot.name].register_post_accumulate_grad_hook(lambda _, i=index: self._arrived(i))

    def _arrived(self, index: int) -> None:
        if self._missing is None:  # not the last micro-batch
            return
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._start(index)

    def _start(self, index: int) -> None:
        start, stop = self.layout.bucket_range(index)
        self._handles[index] = self._exchange.start(self._gradient[start:stop], index)

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        """Do one optimizer step; see ``interfaces.Trainable``."""
        sent = total_bytes(self._exchange.traffic)
        self._exchange.begin(step)
        self._gradient.zero_()
        if self._config.model.dropout:
            torch.manual_seed(_seed(self._config.train.seed, self._place, step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens = sum(batch.tokens for batch in micro_batches)
        for number, batch in enumerate(micro_batches):
            losses = self._train_losses(number, batch)
            loss_sum += losses.detach().sum(dtype=torch.float64)
            if number + 1 == len(micro_batches):
                totals = torch.stack([loss_sum, loss_sum.new_tensor(tokens)])
                self._missing = [last - first for first, last in self.layout.buckets]
            (losses.sum() * (self._scale / self._normaliser)).backward()
        # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
        metrics = self._exchange.start_metrics(totals)
        waited = self._wait()
        totals = metrics.wait()
        loss_sum_value, total = totals.tolist()
        norm = self._apply(learning_rate, step, self._normaliser / (total * self._scale))
        waited += self._finish()
        sent = total_bytes(self._exchange.traffic) - sent
        return StepResult(loss_sum_value / total, total * self._exchange.stands_for, norm, waited, sent)

    @torch.no_grad()
    def _finish(self) -> float:
        """Let the exchange replace the updated parameters; return the seconds that this took."""
        started = time.perf_counter()
        replaced = self._exchange.finish(self._flat)
        if replaced is None:
            return 0.0
        self._flat.copy_(replaced)
        return time.perf_counter() - started

    @torch.no_grad()
    def _wait(self) -> float:
        """Start what has not started, wait for all buckets; return the seconds that this took."""
        self._missing = None
        started = time.perf_counter()
        for index in range(len(self.layout.buckets)):
            if index not in self._handles:
                self._start(index)
        for index, handle in sorted(self._handles.items()):
            reduced = handle.wait()
            start, stop = self.layout.bucket_range(index)
            if reduced.data_ptr() != self._gradient[start:stop].data_ptr():
                self._gradient[start:stop].copy_(reduced)
        self._handles.clear()
        return time.perf_counter() - started

    @torch.no_grad()
    def _apply(self, learning_rate: float, step: int, scale: float) -> float:
        """Rescale, clip and apply the summed gradient; return its norm before clipping."""
        norm = float(torch.linalg.vector_norm(self._gradient)) * scale
        if self._config.train.precision == "fp16" and not self._rescale(norm):
            return norm
        clip = self._config.train.clip
        factor = scale * min(1.0, clip / (norm + 1e-6)) if clip else scale
        if factor != 1.0:
            self._gradient.mul_(factor)
        self._optimizer.update(learning_rate, step)
        return norm

    def _rescale(self, norm: float) -> bool:
        """Adapt fp16's loss scale (Micikevicius et al. 2018, section 3.2); return whether the gradient is usable."""
        if not np.isfinite(norm):
            self._scale, self._steps_unscaled = max(1.0, self._scale / 2), 0
            return False
        self._steps_unscaled += 1
        if self._steps_unscaled == 2000:
            self._scale, self._steps_unscaled = min(2.0**24, self._scale * 2), 0
        return True

    def _train_losses(self, number: int, batch: Batch) -> torch.Tensor:
        carry = None if batch.reset else self._carry.get(number)
        losses, self._carry[number] = self._forward(*self._tensors(batch), carry, True)
        return losses

    def _losses(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, carry: Any, training: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return the losses ``[rows * time]`` in nats, 0 where the target doesn't count, and the carried state."""
        half = _HALF.get(self._config.train.precision)
        with torch.autocast(self._device.type, dtype=half, enabled=half is not None):
            hidden, carry = self._model.hidden(inputs, carry, training, self._config.train.activation_checkpointing)
            scores = self._model.scores(hidden)  # [rows, time, vocab]
        losses = F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (losses if weights is None else losses * weights.flatten()), carry

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        weights = None if batch.weights is None else torch.from_numpy(batch.weights).to(self._device)
        targets = torch.from_numpy(batch.targets).to(self._device, torch.int64)
        return torch.from_numpy(batch.inputs).to(self._device), targets, weights

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (loss sum, tokens); see ``interfaces.Trainable``."""
        carry = None if batch.reset else self._eval_carry
        losses, self._eval_carry = self._losses(*self._tensors(batch), carry, False)
        return float(losses.sum(dtype=torch.float64)), batch.tokens

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token and the cache; see ``interfaces.Trainable``."""
        inputs = torch.from_numpy(np.ascontiguousarray(tokens, np.int32)).to(self._device)
        cache = self._model.cache(len(tokens), self._device) if cache is None else cache
        hidden, cache = self._model.extend(inputs, cache)
        return self._model.scores(hidden[:, -1]).float().cpu().numpy(), cache

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training goes on from; see ``interfaces.Trainable``."""
        unflatten = self.layout.unflatten
        state = {f"parameters/{n}": a for n, a in unflatten(self._flat.cpu().numpy()).items()}
        for kind, flat in self._optimizer.memory.items():
            arrays = unflatten(flat.cpu().numpy())
            state.update({f"optimizer/{kind}/{n}": a for n, a in arrays.items()})
            if self._exchange.apart:
                state.update({f"exchange/own/{kind}/{n}": a for n, a in arrays.items()})
        if self._config.train.precision == "fp16":
            state["optimizer/loss_scale"] = np.array([self._scale, self._steps_unscaled])
        state.update({f"exchange/{n}": a for n, a in self._exchange.state().items()})
        return state | {f"carry/{n}": a for n, a in self._carried().items()}

    def _carried(self) -> dict[str, np.ndarray]:
        parts = [self._model.carry_arrays(self._carry[number]) for number in sorted(self._carry)]
        return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a state; see ``interfaces.Trainable``."""
        self._take(self._flat, "parameters", state, required=True)
        for kind, flat in self._optimizer.memory.items():
            self._take(flat, f"optimizer/{kind}", state, required=False)
            self._take(flat, f"exchange/own/{kind}", state, required=False)
        if "optimizer/loss_scale" in state:
            self._scale, self._steps_unscaled = (
                float(state["optimizer/loss_scale"][0]),
                int(state["optimizer/loss_scale"][1]),
            )
        self._exchange.open(self.layout, self._flat.cpu().numpy())
        self._exchange.load_state({k[9:]: v for k, v in state.items() if k.startswith("exchange/")})
        carried = {k[6:]: v for k, v in state.items() if k.startswith("carry/")}
        self._carry = self._model.carry_tensors(carried, self._config.train.micro_batch_size, self._device)

    def _take(self, flat: torch.Tensor, prefix: str, state: Mapping[str, np.ndarray], required: bool) -> None:
        for slot in self.layout.slots:
            array = state.get(f"{prefix}/{slot.name}")
            if array is None and not required:
                continue
            if array is None or array.shape != slot.shape:
                found = "is missing" if array is None else f"has shape {list(array.shape)}"
                raise HvdlmError(
                    f"the checkpoint doesn't fit the model: {prefix}/{slot.name} {found}, expected {list(slot.shape)}. "
                    "Use the model settings it was trained with (RUN/config.yaml)."
                )
            flat[slot.start : slot.stop].copy_(torch.from_numpy(np.ascontiguousarray(array, np.float32)).flatten())


def _seed(seed: int, place: int, step: int) -> int:
    """Return a seed of its own for every data rank and step."""
    return int(np.random.SeedSequence([seed, place, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
