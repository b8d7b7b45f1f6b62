"""The collectives of tensor ranks in compiled steps: operations whose order torch.compile keeps.

A compiled step calls them as the step it was traced from does: none is left out, doubled or moved past another, so that
all ranks call the same ones in the same order, whatever else differs between their graphs.

Without a twin: XLA compiles no collective of Horovod or MPI.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from hvdlm.protocols.group import Done, Group, Handle

_GROUPS: weakref.WeakValueDictionary[str, TracedGroup] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class TracedGroup:
    """The collectives that flow through layers, among the ranks of ``group``; torch.compile sees its operations.

    Outside of compiled steps it calls ``group`` itself.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ranks = group.ranks
        self._key = str(next(_numbers))  # operations take no objects; a string is a constant of the graph
        _GROUPS[self._key] = self

    def all_reduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        """Start the sum over ranks, shape ``[...]`` kept, which may overwrite ``tensor``."""
        if torch.compiler.is_compiling():
            return Done(torch.ops.hvdlm.all_reduce(tensor, self._key, name))
        return self.group.all_reduce_async(tensor, name)

    def all_gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return the concatenation of ranks' ``[n, ...]``: ``[ranks * n, ...]``."""
        if torch.compiler.is_compiling():
            gathered: torch.Tensor = torch.ops.hvdlm.all_gather(tensor, self._key, name, len(self.ranks))
            return gathered
        return self.group.all_gather(tensor, name)

    def reduce_scatter(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return this rank's shard ``[n / ranks, ...]`` of the sum of ranks' ``[n, ...]``."""
        if torch.compiler.is_compiling():
            shard: torch.Tensor = torch.ops.hvdlm.reduce_scatter(tensor, self._key, name, len(self.ranks))
            return shard
        return self.group.reduce_scatter(tensor, name)

    def reduce_scatter_async(self, tensor: torch.Tensor, name: str) -> Handle:
        """Start ``reduce_scatter``, outside of compiled steps."""
        return self.group.reduce_scatter_async(tensor, name)


@torch.library.custom_op("hvdlm::all_reduce", mutates_args=())
def _all_reduce(tensor: torch.Tensor, key: str, name: str) -> torch.Tensor:
    # Of a copy: groups may sum in place, and an operation may neither change nor return its input.
    copy = tensor.clone(memory_format=torch.contiguous_format)
    return _GROUPS[key].group.all_reduce_async(copy, name).wait()


@_all_reduce.register_fake
def _(tensor: torch.Tensor, key: str, name: str) -> torch.Tensor:
    return tensor.new_empty(tensor.shape)


@torch.library.custom_op("hvdlm::all_gather", mutates_args=())
def _all_gather(tensor: torch.Tensor, key: str, name: str, ranks: int) -> torch.Tensor:
    return _GROUPS[key].group.all_gather(tensor.contiguous(), name)


@_all_gather.register_fake
def _(tensor: torch.Tensor, key: str, name: str, ranks: int) -> torch.Tensor:
    return tensor.new_empty((tensor.shape[0] * ranks, *tensor.shape[1:]))


@torch.library.custom_op("hvdlm::reduce_scatter", mutates_args=())
def _reduce_scatter(tensor: torch.Tensor, key: str, name: str, ranks: int) -> torch.Tensor:
    return _GROUPS[key].group.reduce_scatter(tensor.contiguous(), name)


@_reduce_scatter.register_fake
def _(tensor: torch.Tensor, key: str, name: str, ranks: int) -> torch.Tensor:
    return tensor.new_empty((tensor.shape[0] // ranks, *tensor.shape[1:]))


def keep_order() -> None:
    """Have torch.compile keep all calls of these operations, in their order; to be called before it compiles."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op  # torch has no public name for it

    for operation in (torch.ops.hvdlm.all_reduce, torch.ops.hvdlm.all_gather, torch.ops.hvdlm.reduce_scatter):
        _register_effectful_op(operation.default, _EffectType.ORDERED)
