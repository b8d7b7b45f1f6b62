"""Sequence-to-sequence Transformer: an encoder and a decoder (Vaswani et al. 2017).

Every framework computes, with the layers of ``hvdlm_tasks.models.encoder_decoder_layers``, from the features
``source`` ``[rows, S]`` (ids) and ``source_length`` ``[rows]`` and from the target's tokens ``[rows, time]``::

    x = dropout(embed.tokens[source] * sqrt(width) + positions)        # [rows, S, width]
    for each layer of the encoder: x = layer(x), padding masked
    encoded = norm(x)
    y = dropout(embed.tokens[tokens] * sqrt(width) + positions)        # [rows, time, width]
    for each layer of the decoder: y = layer(y, encoded), padding and later positions masked
    logits = norm(y) @ (embed.tokens or head.weight)^T                 # [rows, time, vocab]

Source and target share the vocabulary and, unless ``model.tie_embeddings`` is false, one embedding matrix, which the
output layer uses too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdlm import hookimpl
from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec
from hvdlm_tasks.models import encoder_decoder_layers as layers

READS = ("source", "source_length")
IMPLEMENTATIONS = {
    "torch": "hvdlm_tasks.torch_models.seq2seq:Seq2Seq",
    "tensorflow": "hvdlm_tasks.tensorflow_models.seq2seq:Seq2Seq",
}


@dataclass(frozen=True)
class Seq2SeqSettings:
    """The model's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    tie_embeddings: bool
    dropout: float


def make_seq2seq(config: ModelConfig, vocab: int, context: int) -> ModelSpec:
    """Return the description of an encoder and a decoder of ``model.layers`` layers each."""
    layers.check_heads(config.width, config.heads)
    tied = config.tie_embeddings is not False
    width, inner = config.width, config.mlp_width or 4 * config.width
    s = Seq2SeqSettings(vocab, config.layers, width, config.heads, inner, tied, config.dropout)
    embedding = Init("normal", width**-0.5)
    params = [ParamSpec("embed.tokens", (vocab, width), ("vocab", "embed"), embedding, decay=True)]
    for i in range(s.layers):
        params += layers.layer(f"encoder.{i}", width, inner, cross_attention=False)
    params += layers.norm("encoder_norm", width)
    for i in range(s.layers):
        params += layers.layer(f"decoder.{i}", width, inner, cross_attention=True)
    params += layers.norm("final_norm", width)
    if not tied:
        params.append(ParamSpec("head.weight", (vocab, width), ("vocab", "embed"), embedding, decay=True))
    # A token of a batch stands for one source and one target token: each passes the layers of its own side.
    products = sum(p.size for p in params if len(p.shape) > 1 and p.name.startswith(("encoder.", "decoder.")))
    return ModelSpec(
        "seq2seq", s, tuple(params), 6.0 * (products + vocab * width), reads=READS, implementations=IMPLEMENTATIONS
    )


@hookimpl
def hvdlm_models() -> Mapping[str, ModelMaker]:
    """Return the model ``seq2seq``."""
    return {"seq2seq": make_seq2seq}
