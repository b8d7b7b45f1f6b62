"""A framework in numpy alone, unknown to Horovod: the built-in plain recurrent model, with gradients by hand.

Its tensors are read-only arrays, as immutable as those of JAX, and it has no ``host_tensors``.
"""

from __future__ import annotations

import math

import numpy as np

from hvdlm import hookimpl
from hvdlm.communication.traffic import by_axis, grown
from hvdlm.errors import HvdlmError
from hvdlm.parallel.sharded_state import ShardedState, recurrent_entries, recurrent_state
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.protocols.types import StepResult
from hvdlm_language.axis_groups import count_traffic, make_axes

OPTIMIZERS = ("adamw", "sgd")


class Framework:
    """Implements ``Framework``."""

    name = "numpy_framework"
    in_place = False

    def build(self, model, mesh, world, exchange, config):
        unknown = model.kind != "rnn" or model.settings.cell != "rnn" or config.train.optimizer not in OPTIMIZERS
        if unknown or mesh.tensor * mesh.pipeline > 1 or model.adapters or config.model.dropout:
            raise HvdlmError("framework numpy_framework computes plain recurrent models on data-parallel ranks only.")
        return Trainable(model, mesh, world, exchange, config)

    def tensor(self, array):
        tensor = np.array(array)
        tensor.flags.writeable = False
        return tensor


class Trainable:
    """Implements ``Trainable``."""

    def __init__(self, spec, mesh, world, exchange, config):
        shard = make_model_shard(spec, mesh, world.rank, config.parallel)
        self.spec, self.exchange, self.config = spec, exchange, config
        self.sharded = ShardedState(spec, shard, exchange, config, mesh, world.rank)
        self.flat = self.sharded.initial()
        self.decay = self.sharded.update_shard(self.sharded.layout.decay_mask())
        self.memories = {kind: np.zeros_like(self.decay) for kind in optimizer_state(config.train)}
        self.counters = count_traffic(make_axes(world, mesh, shard), exchange)
        self.carry, self.eval_carry = {}, None
        exchange.open(self.sharded.layout, self.flat)

    @property
    def parameters(self):
        return {s.name: self.flat[s.start : s.stop].reshape(s.shape) for s in self.sharded.layout.slots}

    def train_step(self, micro_batches, learning_rate, step, limit=math.inf):
        before = by_axis(self.counters.traffic())
        self.exchange.begin(step)
        gradient, totals = np.zeros_like(self.flat), np.zeros(2)
        for number, batch in enumerate(micro_batches):
            carry = None if batch.reset else self.carry.get(number)
            losses, gradients, self.carry[number] = back_propagate(self.parameters, self.spec.settings, batch, carry)
            totals += losses.sum(dtype=np.float64), batch.tokens
            for slot in self.sharded.layout.slots:
                gradient[slot.start : slot.stop] += gradients[slot.name].reshape(-1)
        (loss, tokens, squared), summed = self.reduce(gradient, totals)
        norm = math.sqrt(squared) / tokens
        applied = norm <= limit and norm < math.inf
        if applied:
            clip = self.config.train.clip
            self.apply(summed / tokens * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0), learning_rate, step)
        replaced = self.exchange.finish(self.flat) if self.exchange.traits.zero_size == 1 else self.gathered()
        if replaced is not None:
            self.flat[...] = np.asarray(replaced)
        axes = grown(by_axis(self.counters.traffic()), before)
        stands_for = tokens * self.exchange.stands_for
        return StepResult(
            loss / tokens, stands_for, norm, 0.0, sum(axes.values()), axis_bytes=axes, skipped=not applied
        )

    def reduce(self, gradient, totals):
        """Return (loss sum, tokens, squared norm) and this rank's shard of the gradient, summed over the ranks."""
        tensor, layout = Framework().tensor, self.sharded.layout
        ranges = [layout.bucket_range(index) for index in range(len(layout.buckets))]
        handles = [self.exchange.start(tensor(gradient[a:b]), index) for index, (a, b) in enumerate(ranges)]
        summed = np.concatenate([np.asarray(handle.wait()) for handle in handles]).astype(np.float32)
        squared = sum(float(np.square(summed[a:b], dtype=np.float64).sum()) for a, b in self.sharded.norm_ranges)
        if self.exchange.traits.zero_size == 1:
            return (*np.asarray(self.exchange.start_metrics(tensor(totals)).wait()).tolist(), squared), summed
        return np.asarray(self.exchange.start_metrics(tensor([*totals, squared])).wait()).tolist(), summed

    def apply(self, gradient, rate, step):
        """Apply AdamW (Loshchilov and Hutter 2019) or SGD with momentum to this rank's shard of the parameters."""
        c, updated = self.config.train, self.sharded.update_shard(self.flat)
        if c.optimizer == "adamw":
            first, second = self.memories.values()
            updated -= rate * c.weight_decay * self.decay * updated
            first += (1 - c.beta1) * (gradient - first)
            second += (1 - c.beta2) * (gradient * gradient - second)
            scale = np.sqrt(second / (1 - c.beta2 ** (step + 1))) + c.epsilon
            updated -= rate / (1 - c.beta1 ** (step + 1)) * first / scale
        else:
            gradient = gradient + c.weight_decay * self.decay * updated
            for momentum in self.memories.values():
                momentum[...] = c.momentum * momentum + gradient
                gradient = gradient + c.momentum * momentum if c.nesterov else momentum
            updated -= rate * gradient
        for (start, stop), (a, b) in zip(self.sharded.update_ranges, self.sharded.shard_ranges, strict=True):
            self.flat[start:stop] = updated[a:b]

    def gathered(self):
        tensor = Framework().tensor
        shards = [tensor(self.flat[start:stop]) for start, stop in self.sharded.update_ranges]
        return np.concatenate([np.asarray(bucket) for bucket in self.exchange.gather(shards)])

    def eval_step(self, batch):
        carry = None if batch.reset else self.eval_carry
        hidden, carries = forward(self.parameters, self.spec.settings, batch.inputs, carry)
        self.eval_carry = [states[:, -1] for states in carries]
        losses, _ = cross_entropy(scores(self.parameters, hidden), batch)
        return float(losses.sum(dtype=np.float64)), batch.tokens

    def logits(self, tokens, cache=None):
        hidden, carries = forward(self.parameters, self.spec.settings, tokens, cache)
        return scores(self.parameters, hidden[:, -1]), [states[:, -1] for states in carries]

    def predict(self, batch):
        return scores(self.parameters, forward(self.parameters, self.spec.settings, batch.inputs, None)[0])

    def read(self, batch):
        return None

    def select(self, cache, rows):
        return [states[rows] for states in cache]

    def fingerprints(self):
        return self.sharded.fingerprints(self.flat)

    def memory(self):
        optimizer = sum(array.nbytes for array in self.memories.values())
        return {"parameters": self.flat.nbytes, "gradients": self.flat.nbytes, "optimizer": optimizer, "activations": 0}

    def traffic(self):
        return self.counters.traffic()

    def state(self):
        carries = [dict(enumerate(self.carry[number])) for number in sorted(self.carry)]
        names = [{f"{layer}.0": states for layer, states in carry.items()} for carry in carries]
        return self.sharded.arrays(self.flat, self.memories) | recurrent_entries(names)

    def shards(self):
        return self.sharded.shards(self.memories)

    def replicas(self, names):
        return self.sharded.replicas(names, self.memories)

    def frozen(self):
        return iter(())

    def load_state(self, state):
        flat, self.memories = self.sharded.restore(state, self.flat, self.memories)
        self.flat, self.carry = flat.copy(), {}
        carried = recurrent_state(state)
        if carried:
            layers = [carried[f"{layer}.0"] for layer in range(self.spec.settings.layers)]
            rows = self.config.train.micro_batch_size or len(layers[0])
            self.carry = {n: [a[n * rows : (n + 1) * rows] for a in layers] for n in range(len(layers[0]) // rows)}


def forward(p, s, tokens, carry):
    """Return the last layer's states ``[rows, time, width]`` and every layer's."""
    x, layers = p["embed.tokens"][tokens], []
    for i in range(s.layers):
        w, u = p[f"layers.{i}.input.weight"][:, 0], p[f"layers.{i}.recurrent.weight"][:, 0]
        a = x @ w + p[f"layers.{i}.input.bias"][0] + p[f"layers.{i}.recurrent.bias"][0]
        h, states = np.zeros((len(tokens), s.width), np.float32) if carry is None else carry[i], []
        for t in range(tokens.shape[1]):
            h = np.tanh(a[:, t] + h @ u)
            states.append(h)
        x = np.stack(states, 1)
        layers.append(x)
    return x, layers


def scores(p, hidden):
    return hidden @ p.get("head.weight", p["embed.tokens"]).T + p["head.bias"]


def cross_entropy(logits, batch):
    """Return the losses ``[rows, time]`` and the gradient of their sum by ``logits``."""
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    weights = np.ones(batch.targets.shape, np.float32) if batch.weights is None else batch.weights
    losses = -np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0] * weights
    gradient = np.exp(logs)
    np.put_along_axis(
        gradient, batch.targets[..., None], np.take_along_axis(gradient, batch.targets[..., None], -1) - 1, -1
    )
    return losses, gradient * weights[..., None]


def back_propagate(p, s, batch, carry):
    """Return the losses, the gradients by name, and the last states; by back-propagation through time."""
    hidden, layers = forward(p, s, batch.inputs, carry)
    losses, d_scores = cross_entropy(scores(p, hidden), batch)
    gradients = {name: np.zeros_like(value) for name, value in p.items()}
    head = "head.weight" if "head.weight" in p else "embed.tokens"
    gradients[head] += np.einsum("btv,btw->vw", d_scores, hidden)
    gradients["head.bias"] += d_scores.sum((0, 1))
    d_x = d_scores @ p[head]
    for i in reversed(range(s.layers)):
        x = layers[i - 1] if i else p["embed.tokens"][batch.inputs]
        w, u = p[f"layers.{i}.input.weight"][:, 0], p[f"layers.{i}.recurrent.weight"][:, 0]
        first = np.zeros((len(x), 1, s.width), np.float32) if carry is None else carry[i][:, None]
        before, d_a, d_h = np.concatenate([first, layers[i][:, :-1]], 1), np.empty_like(layers[i]), 0.0
        for t in reversed(range(x.shape[1])):
            d_a[:, t] = (d_x[:, t] + d_h) * (1 - layers[i][:, t] ** 2)
            d_h = d_a[:, t] @ u.T
        gradients[f"layers.{i}.input.weight"][:, 0] = np.einsum("btw,bth->wh", x, d_a)
        gradients[f"layers.{i}.recurrent.weight"][:, 0] = np.einsum("btw,bth->wh", before, d_a)
        for source in ("input", "recurrent"):
            gradients[f"layers.{i}.{source}.bias"][0] = d_a.sum((0, 1))
        d_x = d_a @ w.T
    np.add.at(gradients["embed.tokens"], batch.inputs, d_x)
    return losses, gradients, [states[:, -1] for states in layers]


@hookimpl
def hvdlm_make_framework(name):
    return Framework() if name == "numpy_framework" else None
