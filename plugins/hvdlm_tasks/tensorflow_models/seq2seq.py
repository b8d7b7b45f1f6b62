"""Sequence-to-sequence Transformer in TensorFlow: the equations of ``hvdlm_tasks.models.seq2seq``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from hvdlm_tasks.tensorflow_models.encoder_decoder_layers import EncoderBase, KeysValues, valid_positions
from hvdlm_tensorflow.shapes import sizes


class Cache(NamedTuple):
    """Keys and values of every decoder layer, of the encoder's output and of the tokens so far; the source's mask."""

    source: list[KeysValues]
    target: list[KeysValues]
    mask: tf.Tensor


class Seq2Seq(EncoderBase):
    """An encoder and a decoder, which attends to the encoder's output."""

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` given the source in ``x``."""
        encoded, mask = self._encode(x)
        positions = tf.range(tf.shape(tokens)[1])
        causal = (positions[None, :] <= positions[:, None])[None, None]
        y = self.dropout(self._embed(tokens, 0))
        for i in range(self.s.layers):
            source = self.keys_values(encoded, f"decoder.{i}.reading")
            y, _ = self._layer(y, f"decoder.{i}", None, source, causal, mask)
        return self.norm(y, "final_norm")

    def bind(self, parameters: Mapping[str, tf.Tensor]) -> None:
        """Use these tensors as parameters, all but those of normalisation in the compute precision."""
        super().bind(parameters)
        self.head = (self.p["embed.tokens" if self.s.tie_embeddings else "head.weight"], None)

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., width]``."""
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), self.head[0], transpose_b=True)
        return tf.reshape(flat, [*sizes(hidden)[:-1], self.s.vocab])

    def read(self, x: Mapping[str, tf.Tensor]) -> Cache:
        """Encode the source; return the decoder's cache without tokens."""
        self.start_pass(False, tf.constant([0, 0]))
        encoded, mask = self._encode(x)
        layers = range(self.s.layers)
        empty = tf.zeros([tf.shape(encoded)[0], self.s.heads, 0, self.s.width // self.s.heads], self.dtype)
        return Cache(
            [self.keys_values(encoded, f"decoder.{i}.reading") for i in layers], [(empty, empty)] * len(layers), mask
        )

    def select(self, cache: Cache, rows: tf.Tensor) -> Cache:
        """Return the cache's ``rows`` ``[n]``, in this order."""
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), cache)

    def extend(self, tokens: tf.Tensor, x: Any, cache: Cache) -> tuple[tf.Tensor, Cache]:
        """Return the hidden states of the next token of every row, ``tokens`` ``[rows, 1]``, and the extended cache."""
        self.start_pass(False, tf.constant([0, 0]))
        y = self._embed(tokens, tf.shape(cache.target[0][0])[2])
        target = []
        for i, (past, source) in enumerate(zip(cache.target, cache.source, strict=True)):
            y, extended = self._layer(y, f"decoder.{i}", past, source, None, cache.mask)
            target.append(extended)
        return self.norm(y, "final_norm"), Cache(cache.source, target, cache.mask)

    def _encode(self, x: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the encoder's output ``[rows, S, width]``, and the padding mask."""
        mask = valid_positions(x["source_length"], tf.shape(x["source"])[1])
        h = self.dropout(self._embed(x["source"], 0))
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}")
        return self.norm(h, "encoder_norm"), mask

    def _embed(self, tokens: tf.Tensor, start: Any) -> tf.Tensor:
        return self.add_positions(tf.gather(self.p["embed.tokens"], tokens) * self.s.width**0.5, start)

    def _layer(
        self,
        y: tf.Tensor,
        name: str,
        past: KeysValues | None,
        source: KeysValues,
        causal: tf.Tensor | None,
        mask: tf.Tensor,
    ) -> tuple[tf.Tensor, KeysValues]:
        """Apply a decoder layer to ``y``; return also the keys and values of the ``past`` tokens and of ``y``."""
        h = self.norm(y, f"{name}.attention_norm")
        target = self.keys_values(h, f"{name}.attention")
        if past is not None:
            target = (tf.concat([past[0], target[0]], 2), tf.concat([past[1], target[1]], 2))
        y = y + self.dropout(self.attend(h, target, causal, f"{name}.attention"))
        h = self.attend(self.norm(y, f"{name}.reading_norm"), source, mask, f"{name}.reading")
        y = y + self.dropout(h)
        return y + self.dropout(self.mlp(self.norm(y, f"{name}.mlp_norm"), f"{name}.mlp")), target
