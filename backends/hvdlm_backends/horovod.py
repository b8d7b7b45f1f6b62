"""World over ``horovod.FRAMEWORK``; its groups (``groups.py``) are process sets.

Only Horovod's plain collectives are used. Process sets are declared when Horovod starts: added later, they fail over
Gloo. Horovod starts once in a process, since the launcher's server keeps the addresses of the first time: later worlds
of the process use it again, and it is shut down when the process ends.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import Launch
from hvdlm.protocols.framework import Framework
from hvdlm_backends.environment import check_gloo_address, shared_settings
from hvdlm_backends.groups import HorovodGroup
from hvdlm_backends.horovod_support import GPUs, HasHorovod, HorovodSupport
from hvdlm_backends.messages import ArrayMessages, MPIMessages
from hvdlm_backends.worlds import RanksWorld


def _library(hvd: ModuleType) -> Any:
    """Return the functions that Horovod exports; hvdlm's build (hvdlm_horovod.patches) has some more."""
    return importlib.import_module(f"{hvd.__name__}.mpi_ops")._basics.MPI_LIB_CTYPES


def _transfer_counter(hvd: ModuleType) -> Callable[[], float] | None:
    """Return the counter of transfer seconds in hvdlm's build of Horovod, None in others."""
    function = getattr(_library(hvd), "horovod_transfer_seconds", None)
    if function is not None:
        function.restype = ctypes.c_double
    return function


class HorovodWorld(RanksWorld):
    """World of Horovod's ranks; host-side messages use mpi4py where there is MPI.

    ``on_host``: whether tensors on GPUs travel through host memory, since ranks share GPUs.
    """

    def __init__(
        self,
        framework: Framework,
        hvd: ModuleType,
        sets: Mapping[tuple[int, ...], Any],
        communicator: Any = None,
        on_host: bool = False,
    ) -> None:
        served = support(framework)
        messages = ArrayMessages(hvd, served.messages(hvd)) if communicator is None else MPIMessages(communicator)
        super().__init__(hvd.rank(), hvd.size(), messages, communicator)
        self.local_rank = hvd.local_rank()
        self.local_size = hvd.local_size()
        self._hvd = hvd
        self._operations, bf16 = served.operations(hvd, on_host), hasattr(_library(hvd), "horovod_bfloat16")
        for ranks, process_set in {tuple(range(self.size)): hvd.global_process_set, **sets}.items():
            self.groups[ranks] = HorovodGroup(self._operations, ranks, process_set, self.recorder, bf16)
        self._transfer_counter = _transfer_counter(hvd)
        self.transport = "gloo" if communicator is None else "mpi"

    def transfer_seconds(self) -> float | None:
        """Return the seconds that Horovod's thread spent in transfers; None where this build doesn't count them."""
        seconds = self._transfer_counter() if self._transfer_counter else -1.0
        return seconds if seconds >= 0 else None

    def close(self) -> None:
        """End this world's threads. Horovod itself ends with the process, since it can't be started again."""
        self._operations.close()


class _Started(NamedTuple):
    """Horovod as it was started in this process."""

    framework: str
    hvd: ModuleType
    sets: dict[tuple[int, ...], Any]
    settings: bytes


_started: list[_Started] = []


def _use_again(started: _Started, framework: str, needed: Sequence[tuple[int, ...]]) -> tuple:
    """Return Horovod as it was started, and its process sets; ``needed``: the groups that need one.

    Raises:
        HvdlmError: it was started for another framework or layout, or with other settings.
    """
    differing = None
    if framework != started.framework:
        differing = f"framework {started.framework}, not {framework}"
    elif not started.sets.keys() >= set(needed):
        differing = "another layout (parallel.*)"
    elif shared_settings() != started.settings:
        differing = "other settings of Horovod (communication.*, HOROVOD_*)"
    if differing:
        raise HvdlmError(
            f"Horovod starts once in a process, and was started here with {differing}: use another process, or "
            "--backend mpi4py, which can change it."
        )
    return started.hvd, {ranks: started.sets[ranks] for ranks in needed}


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
        HvdlmError: Horovod isn't built for the framework, has fewer ranks than the launcher started, or was started
            otherwise in this process.
    """
    gpus = support(framework).gpus
    size = launch.size if launch else 1
    needed = list(dict.fromkeys(tuple(ranks) for ranks in groups if len(ranks) < size))
    if _started:
        return _use_again(_started[0], framework.name, needed)
    try:
        hvd = importlib.import_module(f"horovod.{framework.name}")
    except ImportError as error:
        raise HvdlmError(
            f"Horovod has no {framework.name} operations here ({str(error).splitlines()[0]}): python -m hvdlm horovod "
            "build, or --backend mpi4py."
        ) from error
    check_gpus(hvd, framework.name, gpus, size, launch.local_size if launch else 1)
    if size > 1 and os.environ.get("HOROVOD_CONTROLLER") == "gloo":
        check_gloo_address(bound_by_name=_transfer_counter(hvd) is None)
    sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in needed}
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
    _started.append(_Started(framework.name, hvd, sets, shared_settings()))
    process.closers.append(hvd.shutdown)
    return hvd, sets


def check_gpus(hvd: ModuleType, framework: str, gpus: GPUs, size: int, local_size: int) -> None:
    """Check that Horovod supports GPUs where the framework gives it tensors on them.

    A single rank sends nothing, and ranks that share GPUs send from host memory.

    Raises:
        HvdlmError: it doesn't, so that the first collective would fail.
    """
    if size == 1 or hvd.cuda_built() or hvd.rocm_built() or not gpus.in_use() or gpus.count() < local_size:
        return
    raise HvdlmError(
        f"{framework} uses a GPU, but Horovod was built without CUDA and can't exchange tensors on GPUs: "
        "HOROVOD_GPU_OPERATIONS=NCCL make setup (python -m hvdlm horovod build --gpu nccl), --backend mpi4py, "
        "which copies through host memory, or CUDA_VISIBLE_DEVICES='', which hides the GPU."
    )
