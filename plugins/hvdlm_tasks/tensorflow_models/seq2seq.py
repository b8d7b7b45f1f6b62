"""Encoder and decoder in TensorFlow: the equations of ``hvdlm_tasks.models.seq2seq``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf
from hvdlm_tasks.tensorflow_models.encoder_decoder_layers import KeysValues, Reader, within


class Cache(NamedTuple):
    """Keys and values of every decoder layer: of what was read, and of what has been written; and where padding is."""

    read: list[KeysValues]
    written: list[KeysValues]
    mask: tf.Tensor


class Seq2Seq(Reader):
    """A Transformer that writes what it has read in another language."""

    def compute(self, tokens: tf.Tensor, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` that stand after the source ``x``."""
        read, mask = self._encode(x)
        places = tf.range(tf.shape(tokens)[1])
        seen = (places[None, :] <= places[:, None])[None, None]
        y = self.dropout(self._embed(tokens, 0))
        for i in range(self.s.layers):
            kv = self.keys_values(read, f"decoder.{i}.reading")
            y, _ = self._layer(y, f"decoder.{i}", None, kv, seen, mask)
        return self.norm(y, "final_norm")

    def scores(self, hidden: tf.Tensor) -> tf.Tensor:
        """Return logits ``[..., vocab]`` of hidden states ``[..., width]``."""
        head = self.p["embed.tokens" if self.s.tie_embeddings else "head.weight"]
        flat = tf.matmul(tf.reshape(hidden, [-1, self.s.width]), head, transpose_b=True)
        return tf.reshape(flat, tf.concat([tf.shape(hidden)[:-1], [self.s.vocab]], 0))

    def read(self, x: Mapping[str, tf.Tensor]) -> Cache:
        """Return what the decoder needs of the source, nothing written yet."""
        self.begin(False, tf.constant([0, 0]))
        read, mask = self._encode(x)
        layers = range(self.s.layers)
        empty = tf.zeros([tf.shape(read)[0], self.s.heads, 0, self.s.width // self.s.heads], self.dtype)
        return Cache(
            [self.keys_values(read, f"decoder.{i}.reading") for i in layers], [(empty, empty)] * len(layers), mask
        )

    def select(self, cache: Cache, rows: tf.Tensor) -> Cache:
        """Return the cache of ``rows`` ``[n]``, in their order."""
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), cache)

    def extend(self, tokens: tf.Tensor, x: Any, cache: Cache) -> tuple[tf.Tensor, Cache]:
        """Return hidden states of one more token a row, ``tokens`` ``[rows, 1]``, and the grown cache."""
        self.begin(False, tf.constant([0, 0]))
        y, written = self._embed(tokens, tf.shape(cache.written[0][0])[2]), []
        for i, (before, read) in enumerate(zip(cache.written, cache.read, strict=True)):
            y, grown = self._layer(y, f"decoder.{i}", before, read, None, cache.mask)
            written.append(grown)
        return self.norm(y, "final_norm"), Cache(cache.read, written, cache.mask)

    def _encode(self, x: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Return what was read ``[rows, S, width]``, and its mask."""
        mask = within(x["source_length"], tf.shape(x["source"])[1])
        h = self.dropout(self._embed(x["source"], 0))
        for i in range(self.s.layers):
            h = self.encoder_layer(h, mask, f"encoder.{i}")
        return self.norm(h, "encoder_norm"), mask

    def _embed(self, tokens: tf.Tensor, start: Any) -> tf.Tensor:
        return self.place(tf.gather(self.p["embed.tokens"], tokens) * self.s.width**0.5, start)

    def _layer(
        self,
        y: tf.Tensor,
        name: str,
        before: KeysValues | None,
        read: KeysValues,
        seen: tf.Tensor | None,
        mask: tf.Tensor,
    ) -> tuple[tf.Tensor, KeysValues]:
        """Return ``y`` through a decoder's layer, and keys and values of what was written ``before`` and of ``y``."""
        h = self.norm(y, f"{name}.attention_norm")
        written = self.keys_values(h, f"{name}.attention")
        if before is not None:
            written = (tf.concat([before[0], written[0]], 2), tf.concat([before[1], written[1]], 2))
        y = y + self.dropout(self.attend(h, written, seen, f"{name}.attention"))
        h = self.attend(self.norm(y, f"{name}.reading_norm"), read, mask, f"{name}.reading")
        y = y + self.dropout(h)
        return y + self.dropout(self.mlp(self.norm(y, f"{name}.mlp_norm"), f"{name}.mlp")), written
