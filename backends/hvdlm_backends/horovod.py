"""World over ``horovod.FRAMEWORK``; its groups (``groups.py``) are process sets.

Only Horovod's plain collectives are used. Process sets are declared when Horovod starts: added later, they fail over
Gloo.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import Launch
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.horovod import GPUs, HasHorovod, HorovodSupport
from hvdlm_backends.environment import check_gloo_address
from hvdlm_backends.groups import HorovodGroup
from hvdlm_backends.messages import ArrayMessages, MPIMessages
from hvdlm_backends.worlds import RanksWorld


def _transfer_counter(hvd: ModuleType) -> Callable[[], float] | None:
    """Return the counter of transfer seconds in hvdlm's build of Horovod (hvdlm_horovod.patches), None in others."""
    library = importlib.import_module(f"{hvd.__name__}.mpi_ops")._basics.MPI_LIB_CTYPES
    function = getattr(library, "horovod_transfer_seconds", None)
    if function is not None:
        function.restype = ctypes.c_double
    return function


class HorovodWorld(RanksWorld):
    """World of Horovod's ranks; host-side messages use mpi4py where there is MPI."""

    def __init__(
        self, framework: Framework, hvd: ModuleType, sets: Mapping[tuple[int, ...], Any], communicator: Any = None
    ) -> None:
        served = support(framework)
        messages = ArrayMessages(hvd, served.messages(hvd)) if communicator is None else MPIMessages(communicator)
        super().__init__(hvd.rank(), hvd.size(), messages, communicator)
        self.local_rank = hvd.local_rank()
        self.local_size = hvd.local_size()
        self._hvd = hvd
        operations = served.operations(hvd)
        for ranks, process_set in {tuple(range(self.size)): hvd.global_process_set, **sets}.items():
            self._groups[ranks] = HorovodGroup(operations, ranks, process_set, self.recorder)
        self._transfer_counter = _transfer_counter(hvd)
        self.transport = "gloo" if communicator is None else "mpi"

    def transfer_seconds(self) -> float | None:
        """Return the seconds that Horovod's thread spent in transfers; None where this build doesn't count them."""
        seconds = self._transfer_counter() if self._transfer_counter else -1.0
        return seconds if seconds >= 0 else None

    def close(self) -> None:
        """Shut Horovod down."""
        self._hvd.shutdown()


def support(framework: Framework) -> HorovodSupport:
    """Return what Horovod needs of the framework; raise HvdlmError where it doesn't provide that."""
    if not isinstance(framework, HasHorovod):
        raise HvdlmError(f"framework {framework.name} is not served by Horovod: use --backend mpi4py.")
    return framework.horovod


def start(
    framework: Framework,
    groups: Sequence[tuple[int, ...]],
    launch: Launch | None,
    advice: str,
    check_settings: Callable[[], None] | None = None,
) -> tuple:
    """Import and start ``horovod.<framework>``; return it and the process set of every group smaller than the world.

    ``check_settings`` compares the settings of several ranks, before Horovod starts, which hangs where they differ.

    Raises:
        HvdlmError: Horovod isn't built for the framework, or has fewer ranks than the launcher started.
    """
    gpus = support(framework).gpus
    try:
        hvd = importlib.import_module(f"horovod.{framework.name}")
    except ImportError as error:
        raise HvdlmError(
            f"Horovod has no {framework.name} operations here ({str(error).splitlines()[0]}): python -m hvdlm horovod "
            "build, or --backend mpi4py."
        ) from error
    size = launch.size if launch else 1
    check_gpus(hvd, framework.name, gpus, size)
    if size > 1 and os.environ.get("HOROVOD_CONTROLLER") == "gloo":
        check_gloo_address(bound_by_name=_transfer_counter(hvd) is None)
    sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in groups if len(ranks) < size}
    if not sets:
        # In hvdlm's build of Horovod (hvdlm_horovod.patches), the thread sleeps until there is a tensor to send. With
        # process sets, a set's tensor would wait for the sleeping threads of ranks outside of the set.
        os.environ.setdefault("HOROVOD_IDLE_CYCLE_TIME", "50")
    if check_settings is not None and size > 1:
        check_settings()
    hvd.init(process_sets=list(sets.values()))
    if hvd.size() != size:
        raise HvdlmError(
            f"{launch.launcher if launch else 'the environment'} started {size} ranks but Horovod found {hvd.size()}: "
            f"each would train on its own. {advice}"
        )
    return hvd, sets


def check_gpus(hvd: ModuleType, framework: str, gpus: GPUs, size: int) -> None:
    """Check that Horovod supports GPUs where the framework gives it tensors on them; a single rank sends nothing.

    Raises:
        HvdlmError: it doesn't, so that the first collective would fail.
    """
    if size == 1 or hvd.cuda_built() or hvd.rocm_built() or not gpus.in_use():
        return
    raise HvdlmError(
        f"{framework} uses a GPU, but Horovod was built without CUDA and can't exchange tensors on GPUs: "
        "HOROVOD_GPU_OPERATIONS=NCCL make setup (python -m hvdlm horovod build --gpu nccl), --backend mpi4py, "
        "which copies through host memory, or CUDA_VISIBLE_DEVICES='', which hides the GPU."
    )
