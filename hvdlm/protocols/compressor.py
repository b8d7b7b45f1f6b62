"""Gradient compression, written once for all frameworks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hvdlm.protocols.types import Tensor

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.config import CompressionConfig


@dataclass(frozen=True)
class Request:
    """One round's collective in ``Compressor.reduce``: ``kind`` is all_reduce, all_gather or all_to_all.

    The result is a list as long as ``tensors``: their sums; or members' tensors as ``[size, ...]``; or, for all_to_all
    of ``[size * n]``, the chunks sent to this member as ``[size, n]``.

    Attributes:
        overwrites: whether sums may overwrite ``tensors``.
    """

    kind: str
    tensors: Sequence[Tensor]
    overwrites: bool = False


Reduced = tuple[Tensor, Callable[[], Tensor]]
"""The sum over all ranks, and a function that returns this rank's contribution as the others received it.

The sum may be of half precision: the exchange converts it.
"""


class Compressor(Protocol):
    """Reduces the bytes of tensors that are summed over ranks; written once for both frameworks, on ``keras.ops``.

    ``hvdlm_compression.compressor.Compressor`` needs only ``compress`` and ``decompress``, and provides the rest.

    Attributes:
        matrices: takes one float32 ``[rows, columns]`` after the other; else a whole bucket as one ``[n]``.
        biased: whether error feedback is on by default.
        feeds_back: whether the algorithm keeps its own compression error: no error feedback is then added.
        replicated: the names in ``memory`` whose values are equal on all ranks.
    """

    matrices: bool
    biased: bool
    feeds_back: bool
    replicated: tuple[str, ...]

    def begin(self, step: int) -> Hashable:
        """Prepare for ``step``; return its phase, see ``Exchange.begin``."""

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a tensor of ``shape`` hands to collectives in a step."""

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the initial values of what is kept from step to step for a tensor of ``shape``."""

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Yield each round's request, receive its result, return the sum; ``memory`` holds keras Variables."""


CompressorMaker = Callable[["CompressionConfig", int, int, int], Compressor]
"""(settings, seed, index of this rank, ranks) -> Compressor; may import keras."""
