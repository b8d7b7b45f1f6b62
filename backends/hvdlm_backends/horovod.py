"""A World over ``horovod.torch`` or ``horovod.tensorflow``; its groups (``groups.py``) are process sets.

Only raw collectives are used. Process sets are declared when Horovod starts: made later, they fail over Gloo.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm_backends.environment import Launch, check_host_name
from hvdlm_backends.groups import HorovodGroup
from hvdlm_backends.messages import make_messages
from hvdlm_backends.worlds import RanksWorld


def _busy_counter(hvd: ModuleType) -> Callable[[], float] | None:
    library = importlib.import_module(f"{hvd.__name__}.mpi_ops")._basics.MPI_LIB_CTYPES
    function = getattr(library, "horovod_transfer_seconds", None)
    if function is not None:
        function.restype = ctypes.c_double
    return function


class HorovodWorld(RanksWorld):
    """A world of Horovod's ranks. Small objects travel as JSON, through mpi4py where there is MPI."""

    def __init__(self, hvd: ModuleType, sets: Mapping[tuple[int, ...], Any], communicator: Any = None) -> None:
        super().__init__(hvd.rank(), hvd.size(), make_messages(hvd, communicator), communicator)
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self._hvd = hvd
        for ranks, process_set in {tuple(range(self.size)): hvd.global_process_set, **sets}.items():
            self._groups[ranks] = HorovodGroup(hvd, ranks, process_set, self.recorder)
        self._busy = _busy_counter(hvd)
        self.transport = "gloo" if communicator is None else "mpi"

    def transfer_seconds(self) -> float | None:
        """Return what Horovod as make setup builds it (hvdlm_horovod.patches) counts; None for any other build."""
        seconds = self._busy() if self._busy else -1.0
        return seconds if seconds >= 0 else None

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
            f"Horovod has no {framework} operations here ({str(error).splitlines()[0]}): python -m hvdlm horovod "
            "build, or --backend mpi4py."
        ) from error
    size = launch.size if launch else 1
    check_gpus(hvd, framework, size)
    if size > 1 and os.environ.get("HOROVOD_CONTROLLER") == "gloo" and _busy_counter(hvd) is None:
        check_host_name()
    sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in groups if len(ranks) < size}
    if not sets:
        # Horovod as make setup builds it (hvdlm_horovod.patches): its thread sleeps until there is a tensor to
        # send. With process sets, a set's tensor would wait for the thread of ranks outside of it.
        os.environ.setdefault("HOROVOD_IDLE_CYCLE_TIME", "50")
    hvd.init(process_sets=list(sets.values()))
    if hvd.size() != size:
        raise HvdlmError(
            f"{launch.launcher if launch else 'the environment'} started {size} ranks but Horovod found {hvd.size()}: "
            f"each would train on its own. {advice}"
        )
    return hvd, sets


def check_gpus(hvd: ModuleType, framework: str, size: int) -> None:
    """Refuse ranks of torch that compute on GPUs beside a Horovod without CUDA.

    TensorFlow copies to the host by itself, and one rank exchanges nothing.

    Raises:
        HvdlmError: the first collective would fail.
    """
    if framework != "torch" or size == 1 or hvd.cuda_built() or hvd.rocm_built():
        return
    if sys.modules["torch"].cuda.is_available():
        raise HvdlmError(
            "torch sees a GPU, but Horovod was built without CUDA and can't exchange what lies there: "
            "HOROVOD_GPU_OPERATIONS=NCCL make setup (python -m hvdlm horovod build --gpu nccl), --backend mpi4py, "
            "which copies through host memory, or CUDA_VISIBLE_DEVICES='', which hides the GPU."
        )
