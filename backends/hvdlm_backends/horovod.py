"""World and Group over ``horovod.torch`` or ``horovod.tensorflow``; a Group is a process set.

Only raw collectives are used. Process sets are declared when Horovod starts: made later, they fail over Gloo.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from hvdlm.interfaces import Done, Group, Handle, HvdlmError, Traffic
from hvdlm_backends.environment import Launch
from hvdlm_backends.local import AloneGroup

_POLL_SECONDS, _POLL_SHARE = 5e-5, 0.03  # of the time waited so far: long waits are looked at rarely


class _Waiting:
    """A torch collective under way; waiting for it is timed."""

    def __init__(self, hvd: ModuleType, handle: Any, traffic: Traffic) -> None:
        self._hvd, self._handle, self._traffic = hvd, handle, traffic
        self._sleeps = hasattr(hvd.mpi_ops.mpi_lib, "horovod_torch_wait_sleeps")

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        # synchronize spins where Horovod is not the one of make setup (scripts/horovod_patches.py), and takes the core
        # from the thread that communicates; so does looking too often.
        while not (self._sleeps or self._hvd.poll(self._handle)):
            time.sleep(max(_POLL_SECONDS, _POLL_SHARE * (time.perf_counter() - started)))
        result = _first(self._hvd.synchronize(self._handle))
        self._traffic.seconds += time.perf_counter() - started
        return result


_THREADS = ThreadPoolExecutor(16, "hvdlm-broadcast")


class _Threaded:
    """A TensorFlow collective under way in a thread of its own; waiting for it is timed."""

    def __init__(self, call: Callable[[], Any], traffic: Traffic) -> None:
        self._future, self._traffic = _THREADS.submit(call), traffic

    def wait(self) -> Any:
        """Return the result."""
        started = time.perf_counter()
        result = self._future.result()
        self._traffic.seconds += time.perf_counter() - started
        return result


class HorovodGroup:
    """The collectives of one process set. Calls and bytes are counted when a call is made.

    Inside a TensorFlow graph a call is made once, when the graph is traced: who runs the graph counts its runs.
    """

    def __init__(self, hvd: ModuleType, ranks: Sequence[int], process_set: Any) -> None:
        self.ranks = tuple(ranks)
        self.traffic: dict[str, Traffic] = {}
        self._hvd, self._set = hvd, process_set
        # TensorFlow's operations take this to keep the same name in every graph; torch's don't know it.
        self._broadcasts: dict[tuple[str, int], Callable[[Any], Any]] = {}
        self._named = {"ignore_name_scope": True} if hvd.__name__.endswith("tensorflow") else {}

    def _count(self, operation: str, name: str, *tensors: Any) -> Traffic:
        traffic = self.traffic.setdefault(f"{name.partition('.')[0]}/{operation}", Traffic())
        traffic.calls += 1
        traffic.bytes += sum(_bytes(tensor) for tensor in tensors)
        return traffic

    def _label(self, operation: str, name: str) -> str:
        """Return the name that ranks agree on; torch adds the operation itself.

        TensorFlow numbers names that its own operations have taken. A reduce-scatter of a name that an all-reduce had
        before ends Horovod's thread.
        """
        return f"hvdlm.{operation}.{name}" if self._named else name

    def _start(self, operation: str, tensor: Any, name: str, **options: Any) -> Handle:
        """Call Horovod's asynchronous form in torch; in TensorFlow the graph makes every operation asynchronous."""
        traffic = self._count(operation, name, tensor)
        options = {"name": self._label(operation, name), "process_set": self._set, **self._named, **options}
        call = operation.replace("_", "")
        if self._named:
            result = _first(getattr(self._hvd, call)(tensor, **options))
            if operation == "reduce_scatter" and tensor.shape[0] and tensor.shape[0] % len(self.ranks) == 0:
                # A graph has to know, so that what is then done with the part can be counted.
                result.set_shape([tensor.shape[0] // len(self.ranks), *tensor.shape[1:]])
            return Done(result)
        in_place = "_async_" if operation == "all_reduce" else "_async"
        return _Waiting(self._hvd, getattr(self._hvd, call + in_place)(tensor, **options), traffic)

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        """Start the sum; see ``interfaces.Group``."""
        return self._start("all_reduce", tensor, name, op=self._hvd.Adasum if op == "adasum" else self._hvd.Sum)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        """Start the concatenation; see ``interfaces.Group``."""
        return self._start("all_gather", tensor, name)

    def all_to_all_async(self, tensor: Any, name: str) -> Handle:
        """Start the exchange of parts; see ``interfaces.Group``."""
        return self._start("all_to_all", tensor, name)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        """Start the sum and its scattering; see ``interfaces.Group``."""
        return self._start("reduce_scatter", tensor, name, op=self._hvd.Sum)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Handle:
        """Start the broadcast; see ``interfaces.Group``."""
        if not self._named:
            return self._start("broadcast", tensor, name, root_rank=self.ranks[root])
        # Outside of a graph, TensorFlow's operations block: a thread waits instead.
        traffic = self._count("broadcast", name, tensor)
        return _Threaded(partial(self._broadcast(name, root), tensor), traffic)

    def _broadcast(self, name: str, root: int) -> Callable[[Any], Any]:
        """Return the broadcast of this name, in a graph of its own where the framework is TensorFlow.

        Outside of graphs, TensorFlow takes an operation that it has made before even if that had another name.
        """
        options = {"name": self._label("broadcast", name), "process_set": self._set, **self._named}
        call = partial(self._hvd.broadcast, root_rank=self.ranks[root], **options)
        if not self._named:
            return call
        if (name, root) not in self._broadcasts:
            self._broadcasts[name, root] = sys.modules["tensorflow"].function(call)
        return self._broadcasts[name, root]

    def _timed(self, operation: str, name: str, tensors: Sequence[Any], call: Callable[[], Any]) -> Any:
        traffic = self._count(operation, name, *tensors)
        started = time.perf_counter()
        result = call()
        traffic.seconds += time.perf_counter() - started
        return result

    def all_reduce(self, tensors: Sequence[Any], name: str) -> list[Any]:
        """Return the sums; see ``interfaces.Group``."""
        if len(tensors) == 1:
            return [self.all_reduce_async(tensors[0], name).wait()]
        if self._named:
            options = {
                "op": self._hvd.Sum,
                "name": self._label("all_reduce", name),
                "process_set": self._set,
                **self._named,
            }
            call = partial(self._hvd.grouped_allreduce, list(tensors), **options)
            return self._timed("all_reduce", name, tensors, lambda: list(call()))
        # One tensor costs Horovod far less than its own fusing of many, each with a handle.
        utils, found = sys.modules["torch._utils"], list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            parts = [tensors[i] for i in places]
            whole = self.all_reduce_async(utils._flatten_dense_tensors(parts), f"{name}.{dtype}").wait()
            for i, part in zip(places, utils._unflatten_dense_tensors(whole, parts), strict=True):
                found[i] = part
        return found

    def all_gather(self, tensor: Any, name: str) -> Any:
        """Return the concatenation; see ``interfaces.Group``."""
        return self.all_gather_async(tensor, name).wait()

    def reduce_scatter(self, tensor: Any, name: str) -> Any:
        """Return this member's part of the sum; see ``interfaces.Group``."""
        return self.reduce_scatter_async(tensor, name).wait()

    def broadcast(self, tensor: Any, root: int, name: str) -> Any:
        """Return the root's tensor; see ``interfaces.Group``."""
        return self._timed("broadcast", name, [tensor], partial(self._broadcast(name, root), tensor))

    def all_to_all(self, tensor: Any, name: str) -> Any:
        """Return the exchanged parts; see ``interfaces.Group``."""
        return self.all_to_all_async(tensor, name).wait()

    def barrier(self) -> None:
        """Wait for all members."""
        if not self._named:
            self._timed("barrier", "barrier", [], lambda: self._hvd.barrier(process_set=self._set))
            return
        # horovod.tensorflow has no barrier: a sum that every member awaits is one.
        token = sys.modules["tensorflow"].zeros(1)
        options = {"op": self._hvd.Sum, "name": "barrier", "process_set": self._set, **self._named}
        self._timed("barrier", "barrier", [], lambda: self._hvd.allreduce(token, **options).numpy())


def _first(result: Any) -> Any:
    """Return the tensor of an all-to-all's (tensor, splits); any other tensor as it is."""
    return result[0] if isinstance(result, tuple) else result


def _bytes(tensor: Any) -> int:
    """Return the bytes of a torch or TensorFlow tensor; 0 where a traced shape is open."""
    if hasattr(tensor, "element_size"):
        return tensor.numel() * tensor.element_size()
    elements = tensor.shape.num_elements()
    return (elements or 0) * tensor.dtype.size


def _busy_counter(hvd: ModuleType) -> Callable[[], float] | None:
    library = importlib.import_module(f"{hvd.__name__}.mpi_ops")._basics.MPI_LIB_CTYPES
    function = getattr(library, "horovod_transfer_seconds", None)
    if function is not None:
        function.restype = ctypes.c_double
    return function


class HorovodWorld:
    """A world of Horovod's ranks. Small objects travel as JSON, through mpi4py where there is MPI."""

    def __init__(self, hvd: ModuleType, sets: Mapping[tuple[int, ...], Any], communicator: Any = None) -> None:
        everyone = tuple(range(hvd.size()))
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self._hvd, self._communicator = hvd, communicator
        self._groups: dict[tuple[int, ...], Group] = {everyone: HorovodGroup(hvd, everyone, hvd.global_process_set)}
        self._sets = sets
        self._busy = _busy_counter(hvd)
        self.transport = "gloo" if communicator is None else "mpi"

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks; see ``interfaces.World``."""
        key = tuple(ranks)
        if len(key) == 1:
            return AloneGroup(key[0])
        if key not in self._groups:
            if key not in self._sets:
                raise HvdlmError(f"ranks {key} are no group of this run's mesh: groups are declared at the start.")
            self._groups[key] = HorovodGroup(self._hvd, key, self._sets[key])
        return self._groups[key]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the root's value on all ranks."""
        if self.size == 1:
            return value
        if self._communicator is not None:
            data = self._communicator.bcast(json.dumps(value).encode() if self.rank == root else None, root)
            return json.loads(data)
        return self.gather_objects(value if self.rank == root else None)[root]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value on all ranks."""
        data = json.dumps(value).encode()
        if self._communicator is not None:
            return [json.loads(part) for part in self._communicator.allgather(data)]
        sizes = self._gather(np.array([len(data)], np.int64), "hvdlm.object_sizes")
        whole = self._gather(np.frombuffer(data, np.uint8).copy(), "hvdlm.objects").tobytes()
        ends = np.cumsum(sizes)
        return [json.loads(whole[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def _gather(self, array: np.ndarray, name: str) -> np.ndarray:
        if self._hvd.__name__.endswith("torch"):
            torch = sys.modules["torch"]
            return self._hvd.allgather(torch.from_numpy(array), name=name).numpy()
        tensorflow = sys.modules["tensorflow"]
        return self._hvd.allgather(tensorflow.constant(array), name=name).numpy()

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is set."""
        return any(self.gather_objects(bool(flag)))

    def raw(self, collective: str, array: np.ndarray, in_place: bool = False) -> Callable[[], Any] | None:
        """Return mpi4py's collective on buffers made here; None where ranks met without MPI."""
        if self._communicator is None:
            return None
        comm, parts = self._communicator, self.size
        received = np.zeros(array.size * (parts if collective == "all_gather" else 1), array.dtype)
        in_place_marker = sys.modules["mpi4py.MPI"].IN_PLACE
        if collective == "reduce_scatter":
            received = received[: array.size // parts].copy()
        return {
            "all_reduce": lambda: comm.Allreduce(in_place_marker if in_place else array, received),
            "all_gather": lambda: comm.Allgather(array, received),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(array, received),
            "broadcast": lambda: comm.Bcast(array, 0),
            "all_to_all": lambda: comm.Alltoall(array, received),
        }[collective]

    def transfer_seconds(self) -> float | None:
        """Return what Horovod as make setup builds it (scripts/horovod_patches.py) counts; None for any other build."""
        seconds = self._busy() if self._busy else -1.0
        return seconds if seconds >= 0 else None

    def abort(self, code: int) -> None:
        """End all ranks: MPI's launcher is told; horovodrun ends the others when one exits with an error."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._communicator is not None:
            self._communicator.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Shut Horovod down."""
        self._hvd.shutdown()


def start(framework: str, groups: Sequence[tuple[int, ...]], launch: Launch | None, advice: str) -> tuple:
    """Import ``horovod.<framework>`` and start it; return it and its process set of every group but the whole world.

    Raises:
        HvdlmError: Horovod isn't built for the framework, or found fewer ranks than the launcher started.
    """
    try:
        hvd = importlib.import_module(f"horovod.{framework}")
    except ImportError as error:
        raise HvdlmError(
            f"Horovod has no {framework} operations here ({str(error).splitlines()[0]}): "
            f'build it with make setup FRAMEWORKS="{framework}".'
        ) from error
    size = launch.size if launch else 1
    sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in groups if len(ranks) < size}
    if not sets:
        # Horovod as make setup builds it (scripts/horovod_patches.py): its thread sleeps until there is a tensor to
        # send. With process sets, a set's tensor would wait for the thread of ranks outside of it.
        os.environ.setdefault("HOROVOD_IDLE_CYCLE_TIME", "50")
    hvd.init(process_sets=list(sets.values()))
    if hvd.size() != size:
        raise HvdlmError(
            f"{launch.launcher if launch else 'the environment'} started {size} ranks but Horovod found {hvd.size()}: "
            f"each would train on its own. {advice}"
        )
    return hvd, sets
