"""Encoder and decoder in TensorFlow: the equations of ``hvdlm.models.seq2seq``, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from hvdlm_tensorflow.models.attention import KeysValues, Reader, within


class Cache(NamedTuple):
    """Keys and values of every decoder layer: of what was read, and of what has been written; and where padding is."""

    read: list[KeysValues]
    written: list[KeysValues]
    mask: tf.Tensor


class Seq2Seq(Reader):
    """A Transformer that writes what it has read in another language."""

    def hidden(
        self,
        tokens: tf.Tensor,
        x: Mapping[str, tf.Tensor],
        carry: Any,
        training: bool,
        checkpointing: bool,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, Any]:
        """Return ``[rows, time, width]`` of ``tokens`` ``[rows, time]`` that stand after the source ``x``."""
        self.begin(training, seed)
        read, mask = self._encode(x)
        places = tf.range(tf.shape(tokens)[1])
        seen = (places[None, :] <= places[:, None])[None, None]
        y = self.dropout(self._embed(tokens, 0))
        for i in range(self.s.layers):
            name = f"decoder.{i}"
            h = self.norm(y, f"{name}.attention_norm")
            h = self.attend(h, self.keys_values(h, f"{name}.attention"), seen, f"{name}.attention")
            y = self._rest(y + self.dropout(h), self.keys_values(read, f"{name}.reading"), mask, name)
        return self.norm(y, "final_norm"), carry

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
            name = f"decoder.{i}"
            h = self.norm(y, f"{name}.attention_norm")
            new = self.keys_values(h, f"{name}.attention")
            written.append((tf.concat([before[0], new[0]], 2), tf.concat([before[1], new[1]], 2)))
            h = self.attend(h, written[-1], None, f"{name}.attention")
            y = self._rest(y + h, read, cache.mask, name)
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

    def _rest(self, y: tf.Tensor, read: KeysValues, mask: tf.Tensor, name: str) -> tf.Tensor:
        """Return ``y`` through what follows self-attention in a decoder's layer."""
        h = self.attend(self.norm(y, f"{name}.reading_norm"), read, mask, f"{name}.reading")
        y += self.dropout(h)
        return y + self.dropout(self.mlp(self.norm(y, f"{name}.mlp_norm"), f"{name}.mlp"))
