"""The world of ranks that are threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.protocols.framework import Framework
from hvdlm_backends.host_groups import HostGroup
from hvdlm_backends.host_tensors import host_tensors
from hvdlm_backends.threads_network import Network
from hvdlm_backends.threads_transport import ThreadsMessages, ThreadsTransport
from hvdlm_backends.worlds import RanksWorld


class ThreadRecorder(FlightRecorder):
    """The flight recorder of a thread, whose network learns when a step begins."""

    def __init__(self, network: Network, rank: int) -> None:
        super().__init__(rank, network.size)
        self._network = network

    def step(self, number: int) -> None:
        """Note that step ``number`` begins."""
        super().step(number)
        self._network.injection.begin_step(self.rank, number, self._network.check)


class ThreadsWorld(RanksWorld):
    """World of one thread among ``network.size``.

    Args:
        network: what the threads share.
        rank: this thread's rank.
        groups: every set of ranks that will be used.
        framework: whose tensors are sent.
        end: ends all ranks, given an exit code; does not return.
    """

    transport = "threads"

    def __init__(
        self,
        network: Network,
        rank: int,
        groups: Sequence[tuple[int, ...]],
        framework: Framework,
        end: Callable[[int], Any],
    ) -> None:
        messages = ThreadsMessages(network, rank, self._step)
        super().__init__(rank, network.size, messages, None, ThreadRecorder(network, rank))
        self.local_rank, self.local_size = rank, network.size
        self._end = end
        self._transports: list[ThreadsTransport] = []
        tensors = host_tensors(framework)
        for ranks in dict.fromkeys([tuple(range(network.size)), *map(tuple, groups)]):
            if len(ranks) > 1 and rank in ranks:
                transport = ThreadsTransport(network.rendezvous(ranks), rank, self._step)
                self._transports.append(transport)
                self.groups[ranks] = HostGroup(transport, tensors, framework.in_place, self.recorder)

    def _step(self) -> int:
        return self.recorder.current_step

    def wait_for_start(self) -> None:
        """Return when all ranks have called it."""
        self._messages.gather(b"")

    def transfer_seconds(self) -> float:
        """Return the seconds that this rank's collectives took, without waiting for other ranks."""
        return sum(transport.seconds for transport in self._transports)

    def abort(self, code: int) -> None:
        """End all ranks."""
        self._end(code)

    def close(self) -> None:
        """Do nothing: there is no connection to close."""
