"""What a framework provides so that Horovod, which has operations of its own for it, moves its tensors.

A framework without ``horovod`` communicates over backend ``mpi4py``. The backends count, time and record collectives;
nothing here does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hvdlm.protocols.group import Handle
from hvdlm.protocols.types import Tensor

if TYPE_CHECKING:
    import numpy as np


class HorovodOperations(Protocol):
    """The collectives of ``horovod.FRAMEWORK`` on the framework's tensors. ``members``: a process set of Horovod."""

    def start(self, operation: str, tensor: Tensor, name: str, members: Any, op: str = "sum") -> Handle:
        """Start all_reduce, all_gather, reduce_scatter or all_to_all, with the results of ``Group``'s methods.

        ``op`` of reductions: sum or adasum. A handle that is ``Done`` is not waited for: inside of a graph, or where
        the call has blocked.
        """

    def start_broadcast(self, tensor: Tensor, root: int, name: str, members: Any) -> Handle:
        """Start to send the tensor of ``root``, a rank of the world, in the background."""

    def broadcast(self, tensor: Tensor, root: int, name: str, members: Any) -> Tensor:
        """Return the tensor of ``root``, a rank of the world."""

    def sum_together(self, tensors: Sequence[Tensor], name: str, members: Any) -> list[Tensor]:
        """Return the sums of several tensors of one dtype, in one collective; they may be overwritten."""

    def barrier(self, members: Any) -> None:
        """Return when all members have called it."""

    def close(self) -> None:
        """End the threads that these operations have started."""


class HorovodMessages(Protocol):
    """Arrays in host memory between all ranks, where there is no MPI to carry the World's messages."""

    def all_gather(self, array: np.ndarray, name: str) -> np.ndarray:
        """Return the concatenation of the ranks' arrays ``[n_i]``, uint8 or int64, each of at least one element."""

    def start_sum(self, counts: Sequence[int], name: str) -> Callable[[], list[int]]:
        """Start to sum the ranks' int32 ``counts``; the function returned waits for the sums."""


class GPUs(Protocol):
    """The GPUs of this node as the framework sees them. Local ranks have them in turn, so that some may share one."""

    def count(self) -> int:
        """Return how many there are; 0: none."""

    def in_use(self) -> bool:
        """Return whether collectives get tensors on a GPU, which Horovod has to be built for."""

    def bind(self, local_rank: int) -> None:
        """Make the GPU of this local rank the current one, on which tensors will be made."""

    def copy_to(self, array: np.ndarray, local_rank: int) -> Tensor:
        """Return ``array`` on the GPU of this local rank."""


class HorovodSupport(Protocol):
    """All that Horovod's backends need of a framework. ``gpus``: those of this node."""

    gpus: GPUs

    def operations(self, hvd: ModuleType, on_host: bool) -> HorovodOperations:
        """Return the collectives; ``hvd``: the module ``horovod.FRAMEWORK``.

        ``on_host``: whether they copy tensors on GPUs to host memory and back.
        """

    def messages(self, hvd: ModuleType) -> HorovodMessages:
        """Return the messages between ranks; ``hvd``: the module ``horovod.FRAMEWORK``."""


@runtime_checkable
class HasHorovod(Protocol):
    """A framework for which Horovod has operations: ``horovod.NAME`` of its ``Framework.name``."""

    horovod: HorovodSupport
