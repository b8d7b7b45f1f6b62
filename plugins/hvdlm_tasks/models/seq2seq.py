"""Encoder and decoder: the Transformer that translates (Vaswani et al. 2017).

What every framework computes, with the layers of ``hvdlm_tasks.models.encoder_decoder_layers``, for the features ``source``
``[rows, S]`` (ids) and ``source_length`` ``[rows]``, and the tokens ``[rows, time]`` written so far::

    x = dropout(embed.tokens[source] * sqrt(width) + positions)        # [rows, S, width]
    for each layer of the encoder: x = layer(x), padding masked
    read = norm(x)
    y = dropout(embed.tokens[tokens] * sqrt(width) + positions)        # [rows, time, width]
    for each layer of the decoder: y = layer(y, read), padding and what comes later masked
    logits = norm(y) @ (embed.tokens or head.weight)^T                 # [rows, time, vocab]

One vocabulary serves both languages, and, unless ``model.tie_embeddings`` is false, one matrix all three places.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm_tasks.models import encoder_decoder_layers

from hvdlm.config import ModelConfig
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec

READS = ("source", "source_length")


@dataclass(frozen=True)
class Seq2SeqSettings:
    """An encoder and decoder's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    tie_embeddings: bool
    dropout: float


def make_seq2seq(config: ModelConfig, vocab: int, context: int) -> ModelSpec:
    """Return the description of an encoder and decoder of ``model.layers`` layers each."""
    encoder_decoder_layers.check_heads(config.width, config.heads)
    tied = config.tie_embeddings is not False
    width, inner = config.width, config.mlp_width or 4 * config.width
    s = Seq2SeqSettings(vocab, config.layers, width, config.heads, inner, tied, config.dropout)
    embedding = Init("normal", width**-0.5)
    params = [ParamSpec("embed.tokens", (vocab, width), ("vocab", "embed"), embedding, decay=True)]
    for i in range(s.layers):
        params += encoder_decoder_layers.layer(f"encoder.{i}", width, inner, reads=False)
    params += encoder_decoder_layers.norm("encoder_norm", width)
    for i in range(s.layers):
        params += encoder_decoder_layers.layer(f"decoder.{i}", width, inner, reads=True)
    params += encoder_decoder_layers.norm("final_norm", width)
    if not tied:
        params.append(ParamSpec("head.weight", (vocab, width), ("vocab", "embed"), embedding, decay=True))
    # Of a pair, every layer sees one of the two sentences; a token stands for one of each.
    products = sum(p.size for p in params if len(p.shape) > 1 and p.name.startswith(("encoder.", "decoder.")))
    return ModelSpec("seq2seq", s, tuple(params), 6.0 * (products + vocab * width), reads=READS)


PRESETS: dict[str, ModelMaker] = {"seq2seq": make_seq2seq}
