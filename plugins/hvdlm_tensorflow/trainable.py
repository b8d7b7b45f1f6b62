"""A model on this rank: computes, hands its gradients to the exchange bucket by bucket, updates."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.config import Config
from hvdlm.exchange import add, since, snapshot, total_bytes
from hvdlm.interfaces import Batch, Exchange, HvdlmError, StepResult, Traffic
from hvdlm.models.layout import make_layout
from hvdlm.models.spec import ModelSpec
from hvdlm_tensorflow.optimizers import FlatOptimizer

_HALF = {"bf16": tf.bfloat16, "fp16": tf.float16}


class TensorFlowTrainable:
    """Parameters lie in one flat variable; a step is one graph, in which buckets travel while others are computed."""

    def __init__(self, spec: ModelSpec, model: Any, exchange: Exchange, config: Config, place: int) -> None:
        self._model, self._exchange, self._config, self._place = model, exchange, config, place
        self.layout = make_layout(spec.params, config.communication.bucket_bytes)
        self._flat = tf.Variable(self.layout.flatten(spec.initial(config.train.seed)))
        self._gradient: Any = tf.Variable(tf.zeros_like(self._flat)) if self._accumulates() else None
        self._optimizer = FlatOptimizer(config.train, self._flat, tf.constant(self.layout.decay_mask()))
        self._normaliser = float(config.train.batch_size * config.data.context)
        self._carry: dict[int, Any] = {}
        self._eval_carry: Any = None
        self._scale, self._steps_unscaled = (2.0**16 if config.train.precision == "fp16" else 1.0), 0
        # What a graph's run moves, by phase: its collectives are counted when it is traced, and then with every run.
        self._moved: dict[Hashable, dict[str, Traffic]] = {}
        model.dtype = _HALF.get(config.train.precision, tf.float32)
        exchange.open(self.layout, self._flat.numpy())
        self._accumulate_graph = tf.function(self._accumulate)
        self._step_graph = tf.function(self._step)
        self._eval_graph = tf.function(self._evaluate)
        self._extend_graph = tf.function(self._extend, reduce_retracing=True)
        self._backward_part = tf.function(self._backward, jit_compile=True) if config.train.compile else self._backward

    def _accumulates(self) -> bool:
        return self._config.train.micro_batch_size is not None

    def _pieces(self) -> dict[str, tf.Tensor]:
        """Return every parameter as a part of the flat vector."""
        parts = tf.split(self._flat, [slot.stop - slot.start for slot in self.layout.slots])
        return {s.name: tf.reshape(part, s.shape) for s, part in zip(self.layout.slots, parts, strict=True)}

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        """Do one optimizer step; see ``interfaces.Trainable``."""
        loss_sum, tokens = tf.zeros((), tf.float64), sum(batch.tokens for batch in micro_batches)
        if self._gradient is not None:
            self._gradient.assign(tf.zeros_like(self._gradient))
        for number, batch in enumerate(micro_batches[:-1]):
            carry, seed = self._start(number, batch, step)
            loss, self._carry[number] = self._accumulate_graph(*_tensors(batch), carry, seed, self._scale_tensor())
            loss_sum += loss
        last = len(micro_batches) - 1
        carry, seed = self._start(last, micro_batches[last], step)
        figures = tf.constant([learning_rate, step, tokens], tf.float64)
        phase, earlier = self._exchange.begin(step), snapshot(self._exchange.traffic)
        arguments = (*_tensors(micro_batches[last]), carry, seed, self._scale_tensor(), loss_sum, figures)
        totals, self._carry[last] = self._step_graph(phase, *arguments)
        loss_sum_value, total, norm, waited = totals.numpy().tolist()
        sent = self._count(phase, earlier, waited)
        self._rescale(norm)
        return StepResult(loss_sum_value / total, total * self._exchange.stands_for, norm, waited, sent)

    def _count(self, phase: Hashable, earlier: Mapping[str, Traffic], waited: float) -> int:
        """Count what the graph's run moved, which is what was counted when it was traced; return the bytes."""
        traced = since(self._exchange.traffic, earlier)
        if traced or phase not in self._moved:
            self._moved[phase] = traced
        else:
            add(self._exchange.traffic, self._moved[phase])
        for key in self._moved[phase]:  # a graph tells the time of all, not of each
            if not key.startswith("metrics"):
                self._exchange.traffic[key].seconds += waited
                break
        return total_bytes(self._moved[phase])

    def _start(self, number: int, batch: Batch, step: int) -> tuple[Any, tf.Tensor]:
        carry = None if batch.reset else self._carry.get(number)
        carry = self._model.cache(len(batch.inputs)) if carry is None else carry
        return carry, tf.constant(_seed(self._config.train.seed, self._place, step, number), tf.int32)

    def _scale_tensor(self) -> tf.Tensor:
        return tf.constant(self._scale, tf.float32)

    def _backward(
        self, pieces: Any, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, scale: Any
    ) -> tuple[tf.Tensor, Any, list[tf.Tensor]]:
        """Return the loss sum (float64), the carried state, and the gradient of every slot, dense and flat."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(pieces)
            losses, carry = self._losses(pieces, inputs, targets, weights, carry, seed, True)
            scaled = tf.reduce_sum(losses) * (scale / self._normaliser)
        gradients = tape.gradient(scaled, [pieces[slot.name] for slot in self.layout.slots])
        flat = [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]
        return tf.reduce_sum(tf.cast(losses, tf.float64)), carry, flat

    def _accumulate(self, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, scale: Any) -> Any:
        loss, carry, gradients = self._backward_part(self._pieces(), inputs, targets, weights, carry, seed, scale)
        self._gradient.assign_add(tf.concat(gradients, 0))
        return loss, carry

    def _step(
        self,
        phase: Hashable,
        inputs: Any,
        targets: Any,
        weights: Any,
        carry: Any,
        seed: Any,
        scale: Any,
        loss_sum: Any,
        figures: Any,
    ) -> tuple[tf.Tensor, Any]:
        loss, carry, gradients = self._backward_part(self._pieces(), inputs, targets, weights, carry, seed, scale)
        buckets = [tf.concat(gradients[first:last], 0) for first, last in self.layout.buckets]
        if self._gradient is not None:
            ranges = [self.layout.bucket_range(i) for i in range(len(buckets))]
            buckets = [b + self._gradient[start:stop] for b, (start, stop) in zip(buckets, ranges, strict=True)]
        with tf.control_dependencies(buckets):
            # Not right after the forward pass: Horovod's thread would take a core from the backward pass.
            totals = tf.stack([loss_sum + loss, figures[2]])
            ready = tf.timestamp()
        metrics = self._exchange.start_metrics(totals)
        handles = [self._exchange.start(bucket, index) for index, bucket in enumerate(buckets)]
        reduced = [handle.wait() for handle in handles]
        with tf.control_dependencies(reduced):
            waited = tf.maximum(tf.timestamp() - ready, 0.0) if self._exchange.size > 1 else ready * 0.0
        totals = metrics.wait()
        norm = self._apply(tf.concat(reduced, 0), totals[1], scale, figures)
        with tf.control_dependencies([norm]):
            ready = tf.timestamp()
        replaced = self._exchange.finish(self._flat.read_value())
        if replaced is not None:
            with tf.control_dependencies([replaced]):
                waited += tf.maximum(tf.timestamp() - ready, 0.0)
            self._flat.assign(replaced)
        return tf.stack([totals[0], totals[1], norm, waited]), carry

    def _apply(self, gradient: tf.Tensor, tokens: tf.Tensor, loss_scale: tf.Tensor, figures: tf.Tensor) -> tf.Tensor:
        """Rescale, clip and apply the summed gradient; return its norm before clipping."""
        scale = self._normaliser / (tokens * tf.cast(loss_scale, tf.float64))
        norm = tf.cast(tf.norm(gradient), tf.float64) * scale
        clip = self._config.train.clip
        factor = scale * tf.minimum(tf.constant(1.0, tf.float64), clip / (norm + 1e-6)) if clip else scale
        learning_rate, step = tf.cast(figures[0], tf.float32), figures[1]

        def update() -> tf.Tensor:
            self._optimizer.update(gradient * tf.cast(factor, tf.float32), learning_rate, step)
            return tf.constant(True)

        if self._config.train.precision == "fp16":
            tf.cond(tf.math.is_finite(norm), update, lambda: tf.constant(False))
        else:
            update()
        return norm

    def _rescale(self, norm: float) -> None:
        """Adapt fp16's loss scale (Micikevicius et al. 2018, section 3.2)."""
        if self._config.train.precision != "fp16":
            return
        if not np.isfinite(norm):
            self._scale, self._steps_unscaled = max(1.0, self._scale / 2), 0
            return
        self._steps_unscaled += 1
        if self._steps_unscaled == 2000:
            self._scale, self._steps_unscaled = min(2.0**24, self._scale * 2), 0

    def _losses(
        self, pieces: Any, inputs: Any, targets: Any, weights: Any, carry: Any, seed: Any, training: bool
    ) -> tuple[tf.Tensor, Any]:
        """Return the losses ``[rows, time]`` in nats, 0 where the target doesn't count, and the carried state."""
        self._model.bind(pieces)
        checkpointing = self._config.train.activation_checkpointing
        hidden, carry = self._model.hidden(inputs, carry, training, checkpointing, seed)
        scores = tf.cast(self._model.scores(hidden), tf.float32)  # [rows, time, vocab]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=scores)
        return (losses if weights is None else losses * weights), carry

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (loss sum, tokens); see ``interfaces.Trainable``."""
        fresh = batch.reset or self._eval_carry is None
        carry = self._model.cache(len(batch.inputs)) if fresh else self._eval_carry
        loss, self._eval_carry = self._eval_graph(*_tensors(batch), carry)
        return float(loss), batch.tokens

    def _evaluate(self, inputs: Any, targets: Any, weights: Any, carry: Any) -> tuple[tf.Tensor, Any]:
        losses, carry = self._losses(self._pieces(), inputs, targets, weights, carry, tf.constant([0, 0]), False)
        return tf.reduce_sum(tf.cast(losses, tf.float64)), carry

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token and the cache; see ``interfaces.Trainable``."""
        inputs = tf.constant(tokens, tf.int32)
        cache = self._model.decoding_cache(len(tokens)) if cache is None else cache
        self._model.check_length(cache, tokens.shape[1])
        scores, cache = self._extend_graph(inputs, cache)
        return scores.numpy(), cache

    def _extend(self, inputs: tf.Tensor, cache: Any) -> tuple[tf.Tensor, Any]:
        self._model.bind(self._pieces())
        hidden, cache = self._model.extend(inputs, cache)
        return tf.cast(self._model.scores(hidden[:, -1]), tf.float32), cache

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that training goes on from; see ``interfaces.Trainable``."""
        unflatten = self.layout.unflatten
        state = {f"parameters/{n}": a for n, a in unflatten(self._flat.numpy()).items()}
        for kind, flat in self._optimizer.memory.items():
            arrays = unflatten(flat.numpy())
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

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a state; see ``interfaces.Trainable``."""
        self._take(self._flat, "parameters", state, required=True)
        for kind, flat in self._optimizer.memory.items():
            self._take(flat, f"optimizer/{kind}", state, required=False)
            self._take(flat, f"exchange/own/{kind}", state, required=False)
        if "optimizer/loss_scale" in state:
            scale, steps = state["optimizer/loss_scale"]
            self._scale, self._steps_unscaled = float(scale), int(steps)
        self._exchange.open(self.layout, self._flat.numpy())
        self._exchange.load_state({k[9:]: v for k, v in state.items() if k.startswith("exchange/")})
        carried = {k[6:]: v for k, v in state.items() if k.startswith("carry/")}
        self._carry = self._model.carry_tensors(carried, self._config.train.micro_batch_size)

    def _take(self, flat: tf.Variable, prefix: str, state: Mapping[str, np.ndarray], required: bool) -> None:
        values = flat.numpy()
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
            values[slot.start : slot.stop] = array.reshape(-1)
        flat.assign(values)


def _tensors(batch: Batch) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    weights = None if batch.weights is None else tf.constant(batch.weights)
    return tf.constant(batch.inputs), tf.constant(batch.targets), weights


def _seed(seed: int, place: int, step: int, number: int) -> np.ndarray:
    """Return int32 ``[2]``, of its own for every data rank, step and micro-batch."""
    return np.random.SeedSequence([seed, place, step, number]).generate_state(2, np.uint32).astype(np.int32)
