"""Tensors of several dtypes as rows of bytes, which one collective sends."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras import backend, ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import itemsize


class Packing:
    """How tensors ``[rows, ...]`` lie in a row of bytes: the widest elements first, so that each is aligned.

    Attributes:
        bytes: of a row, a multiple of four.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        self._dtypes = [backend.standardize_dtype(tensor.dtype) for tensor in tensors]
        widths = [itemsize(tensor) for tensor in tensors]
        self._order = sorted(range(len(tensors)), key=lambda i: -widths[i])
        self._sizes = [math.prod(shape) * width for shape, width in zip(self._shapes, widths, strict=True)]
        self._padding = -sum(self._sizes) % 4
        self.bytes = sum(self._sizes) + self._padding

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return uint8 ``[rows, bytes]``."""
        rows = tensors[0].shape[0]
        chunks = [ops.view(ops.reshape(tensors[i], (rows, -1)), "uint8") for i in self._order]
        if self._padding:
            chunks.append(ops.zeros((rows, self._padding), "uint8"))
        return ops.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Return the tensors ``[rows, ...]`` that are packed in uint8 ``[rows, bytes]``, in their order."""
        unpacked: list[Tensor] = [None] * len(self._order)
        start = 0
        for i in self._order:
            chunk = packed[:, start : start + self._sizes[i]]
            typed = chunk if self._dtypes[i] == "uint8" else ops.view(chunk, self._dtypes[i])
            unpacked[i] = ops.reshape(typed, (packed.shape[0], *self._shapes[i]))
            start += self._sizes[i]
        return unpacked
