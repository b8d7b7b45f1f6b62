"""CTC speech encoder: convolutions, Transformer encoder layers, and logits of the characters for every output frame.

Every framework computes, from the features ``frames`` ``[rows, T, BANDS]`` and ``frame_count`` ``[rows]``::

    x = gelu(conv.0(frames))                         # kernels of 5 frames, here with stride 2: [rows, T/2, width]
    for convolutions 1 to 3: x = x + gelu(conv.i(x)) # receptive field of all four: 0.25 s, a phone and its neighbours
    x = dropout(x + positions)
    for each layer: x = layer(x), padding masked     # encoder layers of hvdlm_tasks.models.encoder_decoder_layers
    logits = norm(x) @ head.weight + head.bias       # [rows, T/2, vocab], id 0 the blank

Convolutions are zero-padded by two frames on either side, and their outputs beyond a row's last frame are set to zero,
so that a row's logits don't depend on the other rows. ``gelu`` is its tanh form. The loss is CTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec
from hvdlm_tasks.models import encoder_decoder_layers as layers

BANDS = 40  # mel bands of a frame
KERNEL = 5
CONVOLUTIONS = 4
READS = ("frames", "frame_count")
IMPLEMENTATIONS = {
    "torch": "hvdlm_tasks.torch_models.ctc:CTC",
    "tensorflow": "hvdlm_tasks.tensorflow_models.ctc:CTC",
}


@dataclass(frozen=True)
class CTCSettings:
    """The encoder's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    dropout: float


def output_frames(frames: Any) -> Any:
    """Return the number of output frames of ``frames`` input frames (a number, an array or a tensor)."""
    return (frames + 1) // 2


def make_ctc(config: ModelConfig, vocab: int, context: int) -> ModelSpec:
    """Return the description of a CTC speech encoder."""
    layers.check_heads(config.width, config.heads)
    width, inner = config.width, config.mlp_width or 4 * config.width
    s = CTCSettings(vocab, config.layers, width, config.heads, inner, config.dropout)
    params: list[ParamSpec] = []
    for number, inputs in enumerate((BANDS, *[width] * (CONVOLUTIONS - 1))):
        shape, bound = (KERNEL, inputs, width), (6.0 / (KERNEL * (inputs + width))) ** 0.5
        axes = ("kernel", "embed", "embed")
        params.append(ParamSpec(f"conv.{number}.weight", shape, axes, Init("uniform", bound), decay=True))
        params.append(ParamSpec(f"conv.{number}.bias", (width,), ("embed",), Init("zeros")))
    for i in range(s.layers):
        params += layers.layer(f"encoder.{i}", width, inner, cross_attention=False)
    params += layers.norm("final_norm", width)
    params += layers.linear("head", width, vocab)
    flops = 6.0 * sum(p.size for p in params if len(p.shape) > 1)
    return ModelSpec("ctc", s, tuple(params), flops, "ctc", READS, IMPLEMENTATIONS)


@hookimpl
def hvdlm_models() -> Mapping[str, ModelMaker]:
    """Return the model ``ctc``."""
    return {"ctc": make_ctc}
