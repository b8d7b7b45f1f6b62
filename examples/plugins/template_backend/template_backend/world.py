"""The world of ranks, its messages, and groups with their collectives."""

import numpy as np

from hvdlm.diagnostics.flight_recorder import skip_in_call_sites
from hvdlm.errors import HvdlmError
from hvdlm_backends.groups import CountedGroup
from hvdlm_backends.host_tensors import host_tensors
from hvdlm_backends.messages import FunctionHandle
from hvdlm_backends.worlds import RanksWorld
from template_backend.sockets import Connection, Hub

skip_in_call_sites(__name__)  # the diagnosis of a hang names the line that called a collective


class SocketMessages:
    """Messages in host memory between all ranks, from which ``RanksWorld`` makes those of a World."""

    def __init__(self, connection, size):
        self._connection = connection
        self._ranks = range(size)

    def gather(self, data):
        """Return every rank's bytes."""
        return self._connection.send(self._ranks, "gather", data)()

    def broadcast(self, data, root):
        """Return the root's bytes."""
        return self._connection.send(self._ranks, "broadcast", data or b"")()[root]

    def add(self, counts):
        """Start to sum the counts of all ranks."""
        wait = self._connection.send(self._ranks, "add", np.array(counts, np.int64).tobytes())
        return FunctionHandle(lambda: sum(np.frombuffer(data, np.int64) for data in wait()).tolist())


class SocketGroup(CountedGroup):
    """The collectives of some ranks: every member gets all members' arrays, and makes its result of them.

    ``counted`` counts and times them, and records them for the diagnosis of hangs.
    """

    def __init__(self, connection, ranks, index, tensors, recorder):
        super().__init__(ranks, recorder)
        self._connection = connection
        self._index = index
        self._tensors = tensors

    def _start(self, operation, tensor, name, combine, shape):
        """Start a collective of which ``combine(arrays)`` is the result; ``shape``: its shape, None where unknown."""

        def send(array, arrived):
            if arrived is not None:
                arrived()  # until the tensor's copy in host memory is complete
            wait = self._connection.send(self.ranks, f"{operation} {name}", array.tobytes())
            shape = (-1, *array.shape[1:]) if operation == "all_gather" else array.shape
            return FunctionHandle(lambda: combine([np.frombuffer(data, array.dtype).reshape(shape) for data in wait()]))

        return self.counted(operation, name, [tensor], lambda: self._tensors.through(tensor, send, shape))

    def all_reduce_async(self, tensor, name, op="sum"):
        """Start the sum, in the order of ranks on all of them: they get equal bits."""
        if op != "sum":
            raise HvdlmError(f"backend template_backend has no reduction {op}: --communication.reduction average.")
        return self._start("all_reduce", tensor, name, _sum, tuple(tensor.shape))

    def all_gather_async(self, tensor, name):
        """Start the concatenation of arrays that may differ in their first dimension."""
        return self._start("all_gather", tensor, name, np.concatenate, (None, *tuple(tensor.shape)[1:]))

    def reduce_scatter_async(self, tensor, name):
        """Start the sum of which this member gets its shard."""
        rows, rest = tensor.shape[0], tuple(tensor.shape)[1:]
        shape = (None if rows is None else rows // len(self.ranks), *rest)
        return self._start("reduce_scatter", tensor, name, lambda arrays: self._chunk(_sum(arrays)), shape)

    def broadcast_async(self, tensor, root, name):
        """Start to send the root's array."""
        return self._start("broadcast", tensor, name, lambda arrays: arrays[root].copy(), tuple(tensor.shape))

    def all_to_all_async(self, tensor, name):
        """Start to send chunk j to member j."""

        def combine(arrays):
            return np.concatenate([self._chunk(array) for array in arrays])

        return self._start("all_to_all", tensor, name, combine, tuple(tensor.shape))

    def barrier(self):
        """Wait for all members."""
        send = self._connection.send
        self.counted("barrier", "barrier", [], lambda: FunctionHandle(send(self.ranks, "barrier", b""))).wait()

    def _chunk(self, array):
        """Return this member's chunk of an array that is split equally."""
        rows = len(array) // len(self.ranks)
        return array[self._index * rows : (self._index + 1) * rows].copy()


def _sum(arrays):
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


class SocketWorld(RanksWorld):
    """The ranks of one machine."""

    transport = "socket"

    def __init__(self, shape, address, groups, framework, timeout):
        rank, size, self.local_rank, self.local_size = shape
        self._hub = Hub(address, size) if rank == 0 else None
        self._connection = Connection(address, rank, timeout)
        super().__init__(rank, size, SocketMessages(self._connection, size), None)
        tensors = host_tensors(framework)
        for ranks in dict.fromkeys([tuple(range(size)), *map(tuple, groups)]):
            if len(ranks) > 1 and rank in ranks:  # RanksWorld has the groups of one rank
                index = ranks.index(rank)
                self.groups[ranks] = SocketGroup(self._connection, ranks, index, tensors, self.recorder)

    def transfer_seconds(self):
        """Return None: the seconds in the background are not measured."""

    def close(self):
        """Close the connection when all ranks are done."""
        self.gather_objects(None)
        self._connection.close()
