"""Collectives and messages in memory, for one rank among the threads of a process."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hvdlm.errors import RankError
from hvdlm.protocols.group import Done, Handle
from hvdlm_backends import array_collectives
from hvdlm_backends.array_collectives import copy_of
from hvdlm_backends.host_transport import Collective
from hvdlm_backends.messages import FunctionHandle
from hvdlm_backends.threads_network import Call, Combine, Network, Rendezvous, Slot


class ThreadsTransport:
    """Implements ``HostTransport`` for one member of a group.

    Attributes:
        seconds: time that its collectives took, without waiting for other ranks.

    Args:
        rendezvous: the group's.
        rank: this rank.
        step: returns the step that this rank is in.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, step: Callable[[], int]) -> None:
        self.ranks = rendezvous.ranks
        self.seconds = 0.0
        self._rendezvous = rendezvous
        self._rank = rank
        self._index = self.ranks.index(rank)
        self._step = step
        self._numbers = itertools.count()
        self._named: Counter[str] = Counter()

    def start(self, collective: Collective, array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
        """Start a collective; see ``HostTransport``."""
        if arrived is not None:
            arrived()
        call = Call(self._rank, self.ranks, collective.operation, collective.name, array.nbytes, self._step())
        if collective.operation == "broadcast" and not collective.now:
            return self._broadcast(collective, array, call)
        combine = partial(_RESULTS[collective.operation], collective)
        slot = self._rendezvous.join(next(self._numbers), array, collective.signature(array), call, combine)
        return FunctionHandle(partial(self._take, slot, collective, array))

    def _broadcast(self, collective: Collective, array: np.ndarray, call: Call) -> Handle:
        """Start a broadcast that is matched by its name: the n-th of a name with the n-th of the others."""
        key, signature = (collective.name, self._named[collective.name]), collective.signature(array)
        self._named[collective.name] += 1
        if self._index == collective.root:
            self._rendezvous.post(key, array, signature, call)
            return Done(array)
        slot = self._rendezvous.expect(key, call)
        return FunctionHandle(partial(self._receive, slot, collective.root, array, signature))

    def _take(self, slot: Slot, collective: Collective, array: np.ndarray) -> np.ndarray:
        """Return this member's result: its own of several, else a copy of the one there is, if others need it, too."""
        is_root = collective.operation == "broadcast" and self._index == collective.root
        takers = len(self.ranks) - (collective.operation == "broadcast")
        result = slot.wait()
        began = time.perf_counter()
        if isinstance(result, list):
            array = result[self._index]
        elif collective.in_place:
            array[...] = result
        elif not is_root:
            array = self._rendezvous.take(slot, takers)
        self.seconds += slot.seconds + time.perf_counter() - began
        return array

    def _receive(self, slot: Slot, root: int, array: np.ndarray, signature: str) -> np.ndarray:
        """Return what the root has posted; ``array``: of the shape and dtype that this member expects."""
        sent = slot.wait()
        sent_signature = slot.signatures[root]
        if sent.nbytes != array.nbytes:
            raise RankError(f"{signature}: expected {array.nbytes} bytes, received {sent.nbytes}.")
        if sent_signature != signature:
            raise RankError(f"ranks have come to different collectives: the root {sent_signature}; this {signature}.")
        began = time.perf_counter()
        received = self._rendezvous.take(slot, len(self.ranks) - 1)
        self.seconds += slot.seconds + time.perf_counter() - began
        return received


def _sum(collective: Collective, arrays: list[np.ndarray]) -> np.ndarray:
    summed = array_collectives.adasum if collective.op == "adasum" else array_collectives.all_reduce
    return summed(arrays)


_RESULTS: dict[str, Callable[[Collective, list[np.ndarray]], Any]] = {
    "all_reduce": _sum,
    "all_gather": lambda _, arrays: array_collectives.all_gather(arrays),
    "reduce_scatter": lambda _, arrays: array_collectives.reduce_scatter(arrays),
    "broadcast": lambda collective, arrays: copy_of(arrays[collective.root]),
    "all_to_all": lambda _, arrays: array_collectives.all_to_all(arrays),
    "barrier": lambda _, arrays: arrays,
}


class ThreadsMessages:
    """Implements ``Messages``: host-side messages between all ranks of ``network``."""

    def __init__(self, network: Network, rank: int, step: Callable[[], int]) -> None:
        self._rank = rank
        self._step = step
        everyone = tuple(range(network.size))
        self._messages = network.rendezvous(everyone, "messages")
        self._sums = network.rendezvous(everyone, "sums")
        self._numbers = itertools.count()
        self._sum_numbers = itertools.count()

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes; see ``Messages``."""
        slot = self._join(self._messages, next(self._numbers), "gather", data, len(data), list)
        return list(slot.wait())

    def broadcast(self, data: bytes | None, root: int) -> bytes:
        """Return the root's bytes; see ``Messages``."""
        sent = data or b"" if self._rank == root else b""
        slot = self._join(
            self._messages, next(self._numbers), "broadcast_bytes", sent, len(sent), lambda values: values[root]
        )
        return bytes(slot.wait())

    def add(self, counts: Sequence[int]) -> Handle:
        """Start a sum in the background; see ``Messages``."""
        slot = self._join(self._sums, next(self._sum_numbers), "agree", list(counts), 8 * len(counts), _sums)
        return FunctionHandle(lambda: list(slot.wait()))

    def _join(
        self, rendezvous: Rendezvous, number: int, operation: str, value: Any, size: int, combine: Combine
    ) -> Slot:
        call = Call(self._rank, rendezvous.ranks, operation, "", size, self._step())
        return rendezvous.join(number, value, operation, call, combine)


def _sums(counts: list[list[int]]) -> list[int]:
    return [sum(values) for values in zip(*counts, strict=True)]
