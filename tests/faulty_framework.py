"""Frameworks that are PyTorch but for their broken contracts, and a faulty model (faulty_contracts.py)."""

import math
from dataclasses import replace

from hvdlm_torch import framework
from hvdlm_torch.models.base import ModelBase
from hvdlm_torch.trainable import Trainable


class Misnamed(Trainable):
    """Has optimizer state under other names, and applies every gradient."""

    def train_step(self, micro_batches, learning_rate, step, limit=math.inf):
        return super().train_step(micro_batches, learning_rate, step)

    def state(self):
        return {name.replace("first_moment", "exp_avg"): array for name, array in super().state().items()}

    def shards(self):
        return {name.replace("first_moment", "exp_avg"): shard for name, shard in super().shards().items()}

    def load_state(self, state):
        super().load_state({name.replace("exp_avg", "first_moment"): array for name, array in state.items()})


class Unsound(Trainable):
    """Its gradients have the wrong sign and are not clipped, and its optimizer resumes having forgotten everything."""

    def train_step(self, micro_batches, learning_rate, step, limit=math.inf):
        return super().train_step(micro_batches, -learning_rate, step, limit)

    def load_state(self, state):
        super().load_state({name: array for name, array in state.items() if not name.startswith("optimizer/")})


class Framework(framework.Framework):
    """PyTorch with trainables of another class."""

    def __init__(self, name, kind):
        super().__init__()
        self.name, self._kind = name, kind

    def build(self, model, mesh, world, exchange, config, *optimizer):
        if self._kind is Unsound:
            config = replace(config, train=replace(config.train, clip=0.0))
        trainable = super().build(model, mesh, world, exchange, config, *optimizer)
        trainable.__class__ = self._kind
        return trainable


class Peeking(ModelBase):
    """A model whose scores depend on the next token."""

    def hidden(self, tokens, x, carry, training, checkpointing):
        following = self.p["embed.tokens"][tokens].roll(-1, 1) if tokens.shape[1] > 1 else 0.0
        states = self.p["embed.tokens"][tokens] + following
        head = self.p.get("head.weight", self.p["embed.tokens"])
        return states @ head.T + self.p["head.bias"], carry
