"""The n-gram model in PyTorch; ``self.p`` holds the parameters by name."""

import torch
import torch.nn.functional as F

from hvdlm_torch.models.base import ModelBase
from template_model import ORDER


class NGram(ModelBase):
    """The equations in ``template_model``."""

    def hidden(self, tokens, x, carry, training, checkpointing):
        """[rows, time] -> [rows, time, vocab]."""
        p, time = self.p, tokens.shape[1]
        e = F.pad(F.embedding(tokens, p["embed.tokens"]), (0, 0, ORDER - 1, 0))  # [rows, 3 + time, width]
        window = torch.cat([e[:, i : i + time] for i in range(ORDER)], -1)  # [rows, time, 4 * width]
        h = torch.tanh(window @ p["hidden.weight"] + p["hidden.bias"])
        return h @ p["head.weight"] + p["head.bias"], carry
