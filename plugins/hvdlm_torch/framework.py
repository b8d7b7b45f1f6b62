"""The framework plugin for PyTorch: chooses the device and builds Trainables."""

from __future__ import annotations

import numpy as np
import torch

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.axis_groups import make_axes
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.world import World
from hvdlm_torch.horovod import Horovod
from hvdlm_torch.host_tensors import HostTensors
from hvdlm_torch.trainable import Trainable


class Framework:
    """Implements ``Framework`` for ``torch``."""

    name = "torch"
    in_place = True  # an all-reduce overwrites the tensor that it sums

    def __init__(self) -> None:
        self.host_tensors = HostTensors()
        self.horovod = Horovod()

    def build(
        self,
        model: ModelSpec,
        mesh: Mesh,
        world: World,
        exchange: Exchange,
        config: Config,
        optimizer: Optimizer | None = None,
    ) -> Trainable:
        """Return the model at its initial values on this rank's device."""
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        device = _choose_device(world, config)
        shard = make_model_shard(model, mesh, world.rank, config.parallel)
        axes = make_axes(world, mesh, shard)
        return Trainable(model, shard, axes, exchange, config, device, mesh, world.rank, optimizer)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return ``array`` on the current device; on a CPU, the tensor shares its memory."""
        return torch.from_numpy(array).to("cuda" if torch.cuda.is_available() else "cpu")


def _choose_device(world: World, config: Config) -> torch.device:
    """Return the GPU of this local rank, or the CPU where no GPU is visible."""
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise HvdlmError(
                f"there is no GPU for local rank {world.local_rank}: this node has {torch.cuda.device_count()}. "
                "Start as many ranks per node as it has GPUs, or hide them with CUDA_VISIBLE_DEVICES=''."
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    if config.train.precision == "fp16":
        raise HvdlmError("train.precision fp16 needs a GPU, and none is visible here: use bf16 or fp32.")
    return torch.device("cpu")
