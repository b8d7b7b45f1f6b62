"""How an architecture of Hugging Face transformers names its sizes in config.json, and its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hvdlm_huggingface.fields import Fields
from hvdlm_language.gpt import GPTSettings

DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
INERT = {*DROPOUT, *SPECIAL}
"""Fields of ``Format.config`` without effect on logits: those of a folder that training started from count."""


@dataclass(frozen=True)
class TensorLocation:
    """The tensor that holds a parameter.

    Attributes:
        tensor: its name in the file.
        transposed: whether the file holds it as ``[outputs, inputs]``.
        chunk: (index, count) of the parameter among those that lie side by side along the outputs.
        by_head: whether they do so head by head, all of a head together, instead of one whole after the other.
        offset: that is added to the tensor's elements.
    """

    tensor: str
    transposed: bool = False
    chunk: tuple[int, int] = (0, 1)
    by_head: bool = False
    offset: float = 0.0

    def spans(self, outputs: slice, size: int, heads: int) -> list[slice]:
        """Return where in the tensor a range of the parameter's ``size`` outputs lies."""
        index, count = self.chunk
        each = size // heads if self.by_head else size
        spans, start = [], outputs.start
        while start < outputs.stop:
            group = start // each
            stop = min(outputs.stop, (group + 1) * each)
            offset = (group * (count - 1) + index) * each
            spans.append(slice(start + offset, stop + offset))
            start = stop
        return spans or [slice(0, 0)]

    def joined(self, params: Sequence[np.ndarray], heads: int) -> np.ndarray:
        """Return the content of the tensor from all parameters that it holds, ``[..., outputs]``."""
        array = params[0]
        if len(params) > 1:
            groups = heads if self.by_head else 1
            stacked = np.stack([p.reshape(*p.shape[:-1], groups, -1) for p in params], -2)
            array = stacked.reshape(*array.shape[:-1], -1)
        array = array - np.float32(self.offset) if self.offset else array
        return array.T if self.transposed else array


class Format(ABC):
    """The format of one architecture.

    Attributes:
        name: ``model_type`` in config.json.
        preset: the name of hvdlm's preset.
        prefix: how the names of the base model's tensors begin.
        architecture: class in transformers.
        heads: names that the head's tensor may have, the first in exports.
        biased: whether all layers have biases.
        aliases: {field of config.json: other names under which transformers, or its earlier versions, have it}.
        buffers: regular expression of tensors that are no parameters: hvdlm computes their values.
    """

    name: ClassVar[str]
    preset: ClassVar[str]
    prefix: ClassVar[str]
    architecture: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ("lm_head",)
    biased: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    buffers: ClassVar[str]
    _outer: ClassVar[Mapping[str, str]]  # outside of layers: {hvdlm's name: name in the base model}
    _layers: ClassVar[str]
    _inner: ClassVar[Mapping[str, str]]  # the same within a layer
    _chunks: ClassVar[Mapping[str, tuple[int, int]]] = {}
    _by_head: ClassVar[bool] = False  # of chunks
    _transposed: ClassVar[bool] = False
    _norm_offset: ClassVar[float] = 0.0

    @abstractmethod
    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` that a config.json stands for, and ``context``, its number of positions.

        Raises:
            ValueError: hvdlm's models don't compute such a model; KeyError: a field is missing.
        """

    @abstractmethod
    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""

    @abstractmethod
    def config(self, s: GPTSettings) -> dict[str, Any]:
        """Return the content of config.json for a model with these settings."""

    def unmet(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings of this architecture that a model doesn't have; none: it is one of this architecture."""
        return {name: value for name, value in self.fixed(s).items() if getattr(s, name) != value}

    def location(self, name: str) -> TensorLocation:
        """Return which tensor holds the parameter ``name``."""
        if name == "head.weight":
            return TensorLocation(f"{self.heads[0]}.weight")
        if name.startswith("embed."):
            return TensorLocation(f"{self.prefix}{self._outer[name]}.weight")
        path, _, kind = name.rpartition(".")
        suffix = "bias" if kind == "bias" else "weight"
        offset = self._norm_offset if kind == "scale" else 0.0
        if path in self._outer:
            return TensorLocation(f"{self.prefix}{self._outer[path]}.{suffix}", offset=offset)
        _, layer, inner = path.split(".", 2)
        tensor = f"{self.prefix}{self._layers}.{layer}.{self._inner[inner]}.{suffix}"
        chunk = self._chunks.get(inner, (0, 1))
        by_head = self._by_head and chunk[1] > 1
        return TensorLocation(tensor, self._transposed and kind == "weight", chunk, by_head, offset)
