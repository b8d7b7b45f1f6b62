"""Collectives among an ordered set of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from hvdlm.protocols.types import Tensor, Traffic


class Handle(Protocol):
    """A collective in progress."""

    def wait(self) -> Tensor:
        """Block until the result is available and return it (in a TensorFlow graph, its consumers wait for it)."""


class Done:
    """A handle whose result is already available."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        """Return the result."""
        return self._result


@runtime_checkable
class Group(Protocol):
    """An ordered set of ranks and the collectives among them, on the active framework's tensors.

    Every member calls the same operations in the same order with the same names. With one member every operation is
    the identity and no library is called. Reductions are sums, never averages: the caller knows the weights.
    dtypes of sums: float32, float64, float16, int32, int64; of the other collectives int8, uint8 and int16 as well.
    A name begins with its purpose and a dot (``gradients.3``); ``traffic`` counts by ``purpose/operation``.
    """

    ranks: tuple[int, ...]
    traffic: dict[str, Traffic]

    def all_reduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        """Start the sum over members, shape ``[...]`` kept; torch sums in place. ``op`` adasum: Maleki et al. 2020."""

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``all_gather``."""

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``reduce_scatter``."""

    def broadcast_async(self, tensor: Tensor, root: int, name: str) -> Handle:
        """Start ``broadcast`` in the background (not inside a TensorFlow graph).

        Members may start several in different orders: they are matched by name.
        """

    def all_to_all_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``all_to_all``."""

    def all_reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums over members of every tensor, as one fused operation; ``tensors`` may be overwritten."""

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return ``[sum of n_i, ...]`` from members' ``[n_i, ...]``, in rank order."""

    def reduce_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """Return this member's ``[n / size, ...]`` of the sum of members' ``[n, ...]``."""

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Tensor:
        """Return the tensor of the member with index ``root`` in ``ranks``."""

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Return ``[n, ...]``: chunk j of every member's equally split ``[n, ...]`` goes to member j."""

    def barrier(self) -> None:
        """Return when all members have called it."""
