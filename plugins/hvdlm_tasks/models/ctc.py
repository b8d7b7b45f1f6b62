"""What hears: convolutions, the encoder of a Transformer, and scores of every character for each frame.

What every framework computes, for the features ``frames`` ``[rows, T, BANDS]`` and ``frame_count`` ``[rows]``::

    x = gelu(conv.0(frames))                         # kernels of 5 frames, this one's stride 2: [rows, T/2, width]
    for convolutions 1 to 3: x = x + gelu(conv.i(x)) # together they hear 0.25 s at once: a sound and its neighbours
    x = dropout(x + positions)
    for each layer: x = layer(x), padding masked     # hvdlm_tasks.models.encoder_decoder_layers, an encoder's
    logits = norm(x) @ head.weight + head.bias       # [rows, T/2, vocab], id 0 the blank

A convolution reads two frames on either side, zeros beyond the ends of a row; what lies beyond its last frame is set to
zero after it, so that a row's scores don't depend on the rows beside it. ``gelu`` is its tanh form. The loss is CTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdlm_tasks.models import encoder_decoder_layers

from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec

BANDS = 40  # mel bands of a frame
KERNEL = 5
CONVOLUTIONS = 4
READS = ("frames", "frame_count")


@dataclass(frozen=True)
class CTCSettings:
    """A listening model's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    dropout: float


def scored(frames: Any) -> Any:
    """Return how many of so many ``frames`` have scores, numbers or any array of them."""
    return (frames + 1) // 2


def make_ctc(config: ModelConfig, vocab: int, context: int) -> ModelSpec:
    """Return the description of a listening model."""
    encoder_decoder_layers.check_heads(config.width, config.heads)
    width, inner = config.width, config.mlp_width or 4 * config.width
    s = CTCSettings(vocab, config.layers, width, config.heads, inner, config.dropout)
    params: list[ParamSpec] = []
    for number, inputs in enumerate((BANDS, *[width] * (CONVOLUTIONS - 1))):
        shape, bound = (KERNEL, inputs, width), (6.0 / (KERNEL * (inputs + width))) ** 0.5
        axes = ("kernel", "embed", "embed")
        params.append(ParamSpec(f"conv.{number}.weight", shape, axes, Init("uniform", bound), decay=True))
        params.append(ParamSpec(f"conv.{number}.bias", (width,), ("embed",), Init("zeros")))
    for i in range(s.layers):
        params += encoder_decoder_layers.layer(f"encoder.{i}", width, inner, reads=False)
    params += encoder_decoder_layers.norm("final_norm", width)
    params += encoder_decoder_layers.linear("head", width, vocab)
    flops = 6.0 * sum(p.size for p in params if len(p.shape) > 1)
    return ModelSpec("ctc", s, tuple(params), flops, "ctc", READS)


PRESETS: dict[str, ModelMaker] = {"ctc": make_ctc}
