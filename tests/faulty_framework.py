"""PyTorch, but with optimizer state under other names, and without the limit of gradients (faulty_contracts.py)."""

import math

from hvdlm_torch import framework
from hvdlm_torch.models.base import ModelBase
from hvdlm_torch.trainable import Trainable


class Misnamed(Trainable):
    def train_step(self, micro_batches, learning_rate, step, limit=math.inf):
        return super().train_step(micro_batches, learning_rate, step)

    def state(self):
        return {name.replace("first_moment", "exp_avg"): array for name, array in super().state().items()}

    def shards(self):
        return {name.replace("first_moment", "exp_avg"): shard for name, shard in super().shards().items()}

    def load_state(self, state):
        super().load_state({name.replace("exp_avg", "first_moment"): array for name, array in state.items()})


class Framework(framework.Framework):
    name = "misnamed"

    def build(self, *arguments):
        trainable = super().build(*arguments)
        trainable.__class__ = Misnamed
        return trainable


class Peeking(ModelBase):
    """A model whose scores depend on the next token."""

    def hidden(self, tokens, x, carry, training, checkpointing):
        following = self.p["embed.tokens"][tokens].roll(-1, 1) if tokens.shape[1] > 1 else 0.0
        states = self.p["embed.tokens"][tokens] + following
        head = self.p.get("head.weight", self.p["embed.tokens"])
        return states @ head.T + self.p["head.bias"], carry
