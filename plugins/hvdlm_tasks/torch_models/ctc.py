"""CTC speech encoder in PyTorch: the equations of ``hvdlm_tasks.models.ctc``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from hvdlm_tasks.models.ctc import CONVOLUTIONS, output_frames
from hvdlm_tasks.torch_models.encoder_decoder_layers import EncoderBase, valid_positions


class CTC(EncoderBase):
    """Logits of the characters for every second frame."""

    def compute(self, tokens: torch.Tensor, x: Mapping[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Return ``[rows, T / 2, width]`` for the frames in ``x``; ``tokens`` are not used."""
        h, lengths = x["frames"], self.lengths(x)
        for number in range(CONVOLUTIONS):
            weight = self.p[f"conv.{number}.weight"].permute(2, 1, 0)  # [width, inputs, kernel]
            bias, stride = self.p[f"conv.{number}.bias"], 1 if number else 2
            convolved = F.gelu(F.conv1d(h.transpose(1, 2), weight, bias, stride, padding=2), approximate="tanh")
            mask = valid_positions(lengths, convolved.shape[2])
            convolved = convolved.transpose(1, 2) * mask.flatten(1).unsqueeze(-1)
            h = h + convolved if number else convolved
        h = self.dropout(self.add_positions(h), training)
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}", training)
        return self.norm(h, "final_norm")

    def lengths(self, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of output frames, int32 ``[rows]``."""
        return output_frames(x["frame_count"])

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``[..., vocab]``."""
        return self.linear(hidden, "head")
