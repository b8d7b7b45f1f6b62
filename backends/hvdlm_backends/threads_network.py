"""How ranks that are threads of one process meet in collectives.

The members of a group leave their arrays in a slot. The last to arrive computes the result, in memory of the slot's
own, and wakes the others, which sleep meanwhile; each then takes a copy, the last one the result itself. Every
collective and message passes through ``Network.arrive``, where latency and faults can be injected.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import numpy as np

from hvdlm.errors import FAILED, RankError
from hvdlm_backends.array_collectives import copy_of

Combine = Callable[[list[Any]], Any]
_ENDED = "another rank of this process has failed"


class RanksEnded(SystemExit):
    """Raised in a rank whose process ends all ranks, because another one failed; it ends a thread silently."""

    def __str__(self) -> str:
        return _ENDED


class Call(NamedTuple):
    """What a rank takes part in.

    Attributes:
        rank: the rank.
        ranks: its group.
        operation: a method of ``Group`` without ``_async``, or of host-side messages: gather, broadcast_bytes, agree.
        name: of the collective; "" of messages.
        bytes: what this rank hands over.
        step: its step; 0 before the first.
    """

    rank: int
    ranks: tuple[int, ...]
    operation: str
    name: str
    bytes: int
    step: int


class Injection(Protocol):
    """Delays and faults of a network (``injected*.py``)."""

    def begin_step(self, rank: int, step: int, check: Callable[[], None]) -> None:
        """Called in the rank's thread when a step begins: may sleep, raise an error, end the rank or hang.

        One that hangs calls ``check`` now and then, which raises RanksEnded when another rank has ended all.
        """

    def arrive(self, call: Call) -> None:
        """Called in the rank's thread before it takes part: may sleep, raise an error or end the rank."""

    def complete_at(self, call: Call, began: float) -> float:
        """Return when a collective is complete (``time.perf_counter()``) to which the last member came at ``began``.

        Called once for each collective, with the last member's call; of a broadcast that is matched by name, with the
        root's when it sends. Ranks that wait sleep until then.
        """


class NoInjection:
    """A network without delays or faults."""

    def begin_step(self, rank: int, step: int, check: Callable[[], None]) -> None:
        """Do nothing."""

    def arrive(self, call: Call) -> None:
        """Do nothing."""

    def complete_at(self, call: Call, began: float) -> float:
        """Return ``began``."""
        return began


class Network:
    """What the ranks of one world share: their groups' slots, and whether one of them has ended."""

    def __init__(self, size: int, injection: Injection | None = None) -> None:
        self.size = size
        self.injection = injection or NoInjection()
        self._lock = threading.Lock()
        self._rendezvous: dict[Hashable, Rendezvous] = {}
        self._ended = False

    def rendezvous(self, ranks: tuple[int, ...], purpose: str = "") -> Rendezvous:
        """Return where ``ranks`` meet for ``purpose``: the same object for each of them."""
        with self._lock:
            return self._rendezvous.setdefault((ranks, purpose), Rendezvous(self, ranks))

    def arrive(self, call: Call) -> None:
        """Note that a rank takes part in a collective: each passes here, in the rank's thread."""
        self.check()
        self.injection.arrive(call)

    def check(self) -> None:
        """Raise RanksEnded where a rank of this world has ended."""
        if self._ended:
            raise RanksEnded(FAILED)

    def end(self) -> None:
        """End all ranks: those that wait, now or later, raise RanksEnded."""
        self._ended = True
        with self._lock:
            known = list(self._rendezvous.values())
        for rendezvous in known:
            rendezvous.wake()


class Slot:
    """One collective: what each member brings, and then the result.

    Attributes:
        values: what the members bring, by their index in the group.
        signatures: what has to be equal for all members, by index.
        missing: the number of members that have not come yet.
        taken: the number of members that have asked for the result.
        copied: the number of those that have a copy of it.
        complete_at: when members may take it (``time.perf_counter()``).
        seconds: how long the transfer takes, from when the last member came.
    """

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.signatures: list[str] = [""] * size
        self.missing = size
        self.taken = self.copied = 0
        self.complete_at = self.seconds = 0.0
        self._result: Any = None
        self._error: str | None = None
        self._finished = False
        self._awake = threading.Event()

    def finish(self, result: Any, error: str | None = None) -> None:
        """Set the result or the error, and wake the members."""
        self.values = []  # arrays that their owners may change now
        self._result, self._error, self._finished = result, error, True
        self._awake.set()

    def wait(self) -> Any:
        """Return the result once it is complete.

        Raises:
            RankError: members came to different collectives, or the result can't be computed.
            RanksEnded: there will be no result.
        """
        self._awake.wait()
        if not self._finished:
            raise RanksEnded(FAILED)
        time.sleep(max(0.0, self.complete_at - time.perf_counter()))
        if self._error is not None:
            raise RankError(self._error)
        return self._result

    def wake(self) -> None:
        """Wake the members though there is no result."""
        self._awake.set()


class Rendezvous:
    """Where the ranks of one group meet; the slots of their collectives for which members are missing."""

    def __init__(self, network: Network, ranks: tuple[int, ...]) -> None:
        self.network = network
        self.ranks = ranks
        self._lock = threading.Lock()
        self._slots: dict[Hashable, Slot] = {}

    def join(self, key: Hashable, value: Any, signature: str, call: Call, combine: Combine) -> Slot:
        """Leave a member's value in slot ``key``; the last member computes ``combine(values)``."""
        self.network.arrive(call)
        slot, last = self._enter(key, call, value, signature)
        if last:
            self._delay(slot, call)
            self._finish(slot, combine)
        return slot

    def post(self, key: Hashable, array: np.ndarray, signature: str, call: Call) -> None:
        """Leave the root's array in slot ``key``, from which the other members take it."""
        self.network.arrive(call)
        copied = copy_of(array)
        slot, _ = self._enter(key, call, copied, signature)
        self._delay(slot, call)
        slot.finish(copied)

    def expect(self, key: Hashable, call: Call) -> Slot:
        """Return slot ``key``, which the root fills by ``post``."""
        self.network.arrive(call)
        return self._enter(key, call, None, "")[0]

    def take(self, slot: Slot, takers: int) -> np.ndarray:
        """Return the result of a slot to one of ``takers``, in memory of its own: a copy unless nobody needs it still.

        The last one to come gets the result itself, but only if all others have copied it: what it does with its memory
        must not reach them.
        """
        result = slot.wait()
        with self._lock:
            slot.taken += 1
            if slot.taken == takers and slot.copied == takers - 1:
                return result
        copied = copy_of(result)
        with self._lock:
            slot.copied += 1
        return copied

    def wake(self) -> None:
        """Wake all members that wait."""
        with self._lock:
            for slot in self._slots.values():
                slot.wake()

    def _enter(self, key: Hashable, call: Call, value: Any, signature: str) -> tuple[Slot, bool]:
        """Return the slot ``key``, and whether this member is the last to come."""
        index = self.ranks.index(call.rank)
        with self._lock:
            self.network.check()  # in the lock: a slot made after ``wake`` would wake nobody
            slot = self._slots.setdefault(key, Slot(len(self.ranks)))
            if value is not None:
                slot.values[index], slot.signatures[index] = value, signature
            slot.missing -= 1
            if not slot.missing:
                del self._slots[key]
            return slot, not slot.missing

    def _delay(self, slot: Slot, call: Call) -> None:
        began = time.perf_counter()
        slot.complete_at = self.network.injection.complete_at(call, began)
        slot.seconds = slot.complete_at - began

    def _finish(self, slot: Slot, combine: Combine) -> None:
        if len(set(slot.signatures)) > 1:
            calls = zip(self.ranks, slot.signatures, strict=True)
            by_rank = "; ".join(f"rank {rank}: {signature}" for rank, signature in calls)
            slot.finish(None, f"ranks have come to different collectives: {by_rank}.")
            return
        began = time.perf_counter()
        try:
            slot.finish(combine(slot.values))
        except Exception as error:  # raised on all members
            slot.finish(None, f"{slot.signatures[0]}: {type(error).__name__}: {error}")
        slot.seconds += time.perf_counter() - began
