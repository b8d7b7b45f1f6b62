"""A framework around ``library.py``: the sums over ranks, the optimizer, the state of a run."""

import math
import time

import numpy as np

from hvdlm.communication.traffic import by_axis, grown
from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.protocols.types import StepResult
from hvdlm_language.axis_groups import count_traffic, make_axes
from template_framework import library


class Framework:
    """Builds models; its tensors are numpy arrays."""

    name = "template_framework"
    in_place = False

    def build(self, model, mesh, world, exchange, config):
        """Return the model at its initial values."""
        return Trainable(model, mesh, world, exchange, config)

    def tensor(self, array):
        """Return the array."""
        return array


class Trainable:
    """A model with its optimizer; the parameters are views of one flat vector."""

    def __init__(self, spec, mesh, world, exchange, config):
        shard = make_model_shard(spec, mesh, world.rank, config.parallel)
        self._spec, self._exchange, self._config = spec, exchange, config
        self._model = spec.kind, spec.settings
        self._sharded = ShardedState(spec, shard, exchange, config, mesh, world.rank)
        self._layout = self._sharded.layout
        self._counters = count_traffic(make_axes(world, mesh, shard), exchange)
        self._set(self._sharded.initial())
        self._mask = self._sharded.update_shard(self._layout.decay_mask())
        self._memory = {kind: np.zeros_like(self._mask) for kind in optimizer_state(config.train)}
        self._states, self._eval_state = {}, None  # of recurrent models: by micro-batch, and in evaluation
        exchange.open(self._layout, self._flat)

    def _set(self, flat):
        self._flat = flat
        self._parameters = {s.name: flat[s.start : s.stop].reshape(s.shape) for s in self._layout.slots}

    # Training

    def train_step(self, micro_batches, learning_rate, step, limit=math.inf):
        """Do one optimizer step on this rank's rows of the global batch."""
        before = by_axis(self._counters.traffic())
        self._exchange.begin(step)
        gradient, loss = 0.0, 0.0
        for number, batch in enumerate(micro_batches):
            state = None if batch.reset else self._states.get(number)
            terms = self._config.train.label_smoothing, self._config.train.z_loss
            batch_loss, by_name, self._states[number] = library.gradients(
                *self._model, self._parameters, batch, state, *terms
            )
            loss += batch_loss
            flat = self._layout.flatten(by_name) / np.float32(self._sharded.loss_divisor)
            # ZeRO-2 sums every micro-batch's gradients at once, and keeps this rank's shard of them.
            gradient = gradient + (self._sum(flat) if self._exchange.traits.scatters_every else flat)
        began = time.perf_counter()
        gradient = gradient if self._exchange.traits.scatters_every else self._sum(gradient)
        loss, tokens, squared = self._metrics(loss, sum(b.tokens for b in micro_batches), gradient)
        waited = time.perf_counter() - began
        counted = tokens or math.nan  # a step without any is skipped
        scale = self._sharded.loss_divisor / counted
        norm = math.sqrt(squared) * scale
        applied = norm <= limit and norm != math.inf  # in this form, NaN is skipped too
        if applied:
            clip = self._config.train.clip
            factor = scale * min(1.0, clip / (norm + 1e-6)) if clip else scale
            self._update(gradient * np.float32(factor), learning_rate, step)
        self._replace_parameters()
        axes = grown(by_axis(self._counters.traffic()), before)
        tokens_of_all, sent = tokens * self._exchange.stands_for, sum(axes.values())
        return StepResult(loss / counted, tokens_of_all, norm, waited, sent, axis_bytes=axes, skipped=not applied)

    def _sum(self, flat):
        """Return the sums over the data ranks of all buckets, or this rank's shards of them; concatenated."""
        ranges = [self._layout.bucket_range(index) for index in range(len(self._layout.buckets))]
        handles = [self._exchange.start(flat[a:b].copy(), index) for index, (a, b) in enumerate(ranges)]
        return np.concatenate([np.asarray(handle.wait()) for handle in handles])

    def _metrics(self, loss, tokens, gradient):
        """Return (loss sum, valid tokens, squared norm) of the global batch."""
        squared = float(np.square(gradient, dtype=np.float64).sum())
        if self._exchange.traits.zero_size > 1:  # this rank has the norm of its shard only
            return np.asarray(self._exchange.start_metrics(np.array([loss, tokens, squared])).wait()).tolist()
        return *np.asarray(self._exchange.start_metrics(np.array([loss, tokens])).wait()).tolist(), squared

    def _update(self, g, learning_rate, step):
        """Apply AdamW (Loshchilov and Hutter 2019, algorithm 2) to what this rank updates."""
        c, x = self._config.train, self._sharded.update_shard(self._flat)
        m, v = self._memory["first_moment"], self._memory["second_moment"]
        m += (1 - c.beta1) * (g - m)
        v += (1 - c.beta2) * (g * g - v)
        x -= learning_rate * c.weight_decay * self._mask * x
        denominator = np.sqrt(v) / math.sqrt(1 - c.beta2 ** (step + 1)) + c.epsilon
        x -= learning_rate / (1 - c.beta1 ** (step + 1)) * m / denominator
        for (start, stop), (a, b) in zip(self._sharded.update_ranges, self._sharded.shard_ranges, strict=True):
            self._flat[start:stop] = x[a:b]

    def _replace_parameters(self):
        """Take the shards that other ranks updated, or what the exchange replaces the parameters by."""
        if self._exchange.traits.zero_size > 1:
            shards = [self._flat[start:stop].copy() for start, stop in self._sharded.update_ranges]
            self._flat[:] = np.concatenate([np.asarray(bucket) for bucket in self._exchange.gather(shards)])
            return
        replaced = self._exchange.finish(self._flat)
        if replaced is not None:
            self._flat[:] = np.asarray(replaced)

    def fingerprints(self):
        """Return a CRC-32 of every parameter."""
        return self._sharded.fingerprints(self._flat)

    def memory(self):
        """Return the bytes that this rank holds; those of activations are unknown: 0."""
        optimizer = sum(array.nbytes for array in self._memory.values())
        size = self._flat.nbytes
        return {"parameters": size, "gradients": size, "optimizer": optimizer, "activations": 0}

    def traffic(self):
        """Return the counters of this rank's collectives."""
        return self._counters.traffic()

    # Inference

    def eval_step(self, batch):
        """Return (sum of losses, valid tokens)."""
        state = None if batch.reset else self._eval_state
        loss, self._eval_state = library.loss_sum(*self._model, self._parameters, batch, state)
        return loss, batch.tokens

    def logits(self, tokens, cache=None):
        """Return the scores of the next token, and the cache: all tokens of a GPT, or a recurrent model's state."""
        if self._spec.kind == "rnn":
            scores, state = library.scores(*self._model, self._parameters, tokens, cache)
            return scores[:, -1], state
        text = tokens if cache is None else np.concatenate([cache, tokens], 1)
        if text.shape[1] > self._spec.settings.context:
            raise HvdlmError(f"{text.shape[1]} tokens are more than the context of {self._spec.settings.context}.")
        return library.scores(*self._model, self._parameters, text, None)[0][:, -1], text

    def predict(self, batch):
        """Return the scores at every position."""
        return library.scores(*self._model, self._parameters, batch.inputs, None)[0]

    def read(self, batch):
        """Refuse: no model of this framework reads features."""
        raise HvdlmError("framework template_framework has no model that reads features.")

    def select(self, cache, rows):
        """Return the cache of these rows."""
        if self._spec.kind == "rnn":
            return [[array[rows] for array in layer] for layer in cache]
        return cache[rows]

    # State

    def state(self):
        """Return copies of all that training resumes from."""
        states = [self._states[number] or [] for number in sorted(self._states)]
        arrays = [{f"{i}.{j}": a for i, layer in enumerate(s) for j, a in enumerate(layer)} for s in states]
        return self._sharded.arrays(self._flat, self._memory) | recurrent_entries(arrays)

    def shards(self):
        """Return which shard of the global array every entry of ``state`` is."""
        return self._sharded.shards(self._memory)

    def replicas(self, names):
        """Return the identities of entries that other ranks may hold too."""
        return self._sharded.replicas(names, self._memory)

    def frozen(self):
        """Return no weights: none are frozen."""
        return iter(())

    def load_state(self, state):
        """Restore what ``state`` returned, perhaps in another framework or on another number of ranks."""
        flat, self._memory = self._sharded.restore(state, self._flat, self._memory)
        self._set(flat)
        arrays, self._states = recurrent_state(state), {}
        if not arrays:
            return
        settings, rows = self._spec.settings, len(arrays["0.0"])
        size = self._config.train.micro_batch_size or rows
        for number, start in enumerate(range(0, rows, size)):
            self._states[number] = [
                [arrays[f"{i}.{j}"][start : start + size] for j in range(settings.carries)]
                for i in range(settings.layers)
            ]
