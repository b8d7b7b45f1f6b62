"""Convolutional image classifier in PyTorch: the equations of ``hvdlm_tasks.models.convnet``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from hvdlm_tasks.torch_models.encoder_decoder_layers import EncoderBase


class Convnet(EncoderBase):
    """Logits of every class for an image."""

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return the hidden layer ``[rows, 1, 50]`` for the images in ``x``; ``tokens`` are not used."""
        h = x["images"].unsqueeze(1)  # [rows, 1, 28, 28]
        for name in ("conv.0", "conv.1"):
            weight = self.p[f"{name}.weight"].permute(3, 2, 0, 1)  # [kernels, inputs, 5, 5]
            h = F.relu(F.max_pool2d(F.conv2d(h, weight, self.p[f"{name}.bias"]), 2))
        h = h.permute(0, 2, 3, 1).flatten(1)  # channels last, as the weight has them
        return self.dropout(F.relu(self.linear(h, "dense")), training).unsqueeze(1)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]``."""
        return self.linear(hidden, "head")
