"""Collectives among an ordered set of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Converted:
    """A collective in progress, whose result is converted when it is there."""

    def __init__(self, handle: Handle, convert: Callable[[Tensor], Tensor]) -> None:
        self._handle = handle
        self._convert = convert

    def wait(self) -> Tensor:
        """Return the converted result."""
        return self._convert(self._handle.wait())


class AsyncGroup(Protocol):
    """The collectives of a group, each started without waiting for its result."""

    def all_reduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        """Start the sum over members, shape ``[...]`` kept; where ``Framework.in_place``, it overwrites ``tensor``.

        ``op`` adasum: the combination of Maleki et al. 2020.
        """

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to concatenate the members' ``[n_i, ...]``, in rank order: ``[sum of n_i, ...]``."""

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        """Start the sum of members' ``[n, ...]``, of which this member gets its shard ``[n / size, ...]``."""

    def broadcast_async(self, tensor: Tensor, root: int, name: str) -> Handle:
        """Start to send the tensor of the member with index ``root`` in ``ranks`` (not inside a TensorFlow graph).

        Members may start several in different orders: they are matched by name. The others give only shape and dtype.
        """

    def all_to_all_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to send chunk j of every member's equally split ``[n, ...]`` to member j; it gets ``[n, ...]``."""

    def barrier(self) -> None:
        """Return when all members have called it."""


@runtime_checkable
class Group(AsyncGroup, Protocol):
    """An ordered set of ranks and the collectives among them, on the active framework's tensors.

    Every member calls the same operations in the same order with the same names. With one member every operation is
    the identity and no library is called. Reductions are sums, never averages: the caller knows the weights.
    dtypes of sums: float32, float64, float16, bfloat16, int32, int64; of other collectives int8, uint8, int16 as well.
    A name begins with its purpose and a dot (``gradients.3``); ``traffic`` counts by ``purpose/operation``.

    The methods here wait for the results of the methods of ``AsyncGroup``; ``BlockingForms`` provides them.
    """

    ranks: tuple[int, ...]
    traffic: dict[str, Traffic]

    def all_reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums over members of every tensor; ``tensors`` may be overwritten."""

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return the result of ``all_gather_async``."""

    def reduce_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """Return the result of ``reduce_scatter_async``."""

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Tensor:
        """Return the result of ``broadcast_async``; inside a TensorFlow graph, too."""

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Return the result of ``all_to_all_async``."""


class BlockingForms(AsyncGroup):
    """Base class of groups: ``Group``'s methods that wait, from those of ``AsyncGroup``, which a backend writes."""

    def all_reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums of every tensor; a group may fuse them."""
        handles = [self.all_reduce_async(tensor, f"{name}.{index}") for index, tensor in enumerate(tensors)]
        return [handle.wait() for handle in handles]

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return the concatenation."""
        return self.all_gather_async(tensor, name).wait()

    def reduce_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """Return this member's shard of the sum."""
        return self.reduce_scatter_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Tensor:
        """Return the root's tensor."""
        return self.broadcast_async(tensor, root, name).wait()

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Return the exchanged chunks."""
        return self.all_to_all_async(tensor, name).wait()
