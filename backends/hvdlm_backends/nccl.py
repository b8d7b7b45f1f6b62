"""Backend nccl: collectives on GPUs by NCCL; ranks connect through MPI, or Gloo under ``horovodrun --gloo``.

A Horovod built with NCCL uses it for every tensor on a GPU, whatever the backend: this one checks that it does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import horovod
from hvdlm_backends.gloo import GlooBackend
from hvdlm_backends.local import LocalWorld
from hvdlm_backends.mpi import MPIBackend

SHARED_GPUS = "HVDLM_NCCL_SHARED_GPUS"
"""Environment variable: with 1, ranks of a node may share GPUs under NCCL, each as a node of its own."""


class NCCLBackend:
    """The backend ``nccl``: one GPU for each local rank, unless the environment allows ranks to share GPUs."""

    name = "nccl"

    def __init__(self) -> None:
        self._controller = GlooBackend(nccl=True) if launcher_env.has_gloo_rendezvous() else MPIBackend(nccl=True)

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the launch shape; see the controller's backend."""
        return self._controller.launch_shape()

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank."""
        return self._controller.prepare(config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Check the GPUs and Horovod's build, connect the ranks, and check a first sum on the GPUs.

        Raises:
            HvdlmError: Horovod has no NCCL, ranks would share a GPU, or the sum is wrong.
        """
        rank, size, local_rank, local_size = self.launch_shape()
        check_build(importlib.import_module(f"horovod.{framework.name}"), framework.name)
        gpus = horovod.support(framework).gpus
        check_devices(gpus.count(), local_size)
        if size == 1:
            return LocalWorld()
        if gpus.count() < local_size:
            os.environ["NCCL_HOSTID"] = f"hvdlm-rank-{rank}"  # NCCL takes the ranks for nodes, and uses sockets
        world = self._controller.start(framework, groups, config)
        world.transport = "nccl"
        self_check(world, gpus.copy_to(np.full(1024, world.rank + 1, np.float32), local_rank))
        return world


def check_build(hvd: Any, framework: str) -> None:
    """Raise HvdlmError if Horovod was built without NCCL."""
    if not hvd.nccl_built():
        raise HvdlmError(
            f"backend nccl: Horovod was built without NCCL for {framework}: with CUDA and NCCL installed, "
            "HOROVOD_GPU_OPERATIONS=NCCL make setup or python -m hvdlm horovod build --gpu nccl; otherwise "
            "--backend mpi."
        )


def check_devices(count: int, local_size: int) -> None:
    """Raise HvdlmError if ranks have no GPU of their own: NCCL fails where two of a node share one."""
    if count == 0:
        raise HvdlmError(
            "backend nccl: the framework finds no GPU on this node: use --backend mpi, or check nvidia-smi."
        )
    if local_size > count and os.environ.get(SHARED_GPUS) != "1":
        raise HvdlmError(
            f"backend nccl: {local_size} ranks would share {count} GPU(s) on this node, and NCCL needs one for each: "
            f"start {count} per node, or --backend mpi; for tests, {SHARED_GPUS}=1 in the environment allows it."
        )


def self_check(world: World, tensor: Any) -> None:
    """Check the sum of ``tensor``, all of whose elements are rank + 1. All ranks call.

    Raises:
        HvdlmError: the sum is wrong.
    """
    total = world.group(range(world.size)).all_reduce([tensor], "nccl.self_check")[0]
    values = np.asarray(total.cpu() if hasattr(total, "cpu") else total)
    expected = world.size * (world.size + 1) / 2
    if not np.all(values == expected):
        raise HvdlmError(
            f"backend nccl: a sum over the GPUs gave {values.reshape(-1)[0]}, expected {expected}: run with "
            "NCCL_DEBUG=INFO, or --backend mpi."
        )


@hookimpl
def hvdlm_make_backend(name: str) -> NCCLBackend | None:
    """Return the backend named ``nccl``."""
    return NCCLBackend() if name == "nccl" else None
