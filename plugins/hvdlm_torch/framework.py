"""PyTorch as hvdlm's framework: picks the device and builds Trainables."""

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
from hvdlm.protocols.world import World
from hvdlm_torch.host_tensors import TorchHostTensors
from hvdlm_torch.trainable import TorchTrainable


class TorchFramework:
    """The framework ``torch``."""

    name, in_place = "torch", True

    def __init__(self) -> None:
        self.host_tensors = TorchHostTensors()

    def build(self, model: ModelSpec, mesh: Mesh, world: World, exchange: Exchange, config: Config) -> TorchTrainable:
        """Return the model at its initial values on this rank's device; see ``interfaces.Framework``."""
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        device = _device(world, config)
        part = make_model_shard(model, mesh, world.rank, config.parallel)
        axes = make_axes(world, mesh, part)
        return TorchTrainable(model, part, axes, exchange, config, device, mesh, world.rank)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return ``array`` on the device that is current; on a CPU, its memory is shared."""
        return torch.from_numpy(array).to("cuda" if torch.cuda.is_available() else "cpu")


def _device(world: World, config: Config) -> torch.device:
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise HvdlmError(
                f"local rank {world.local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}. "
                "Start as many ranks per node as it has GPUs, or hide them with CUDA_VISIBLE_DEVICES=''."
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    if config.train.precision == "fp16":
        raise HvdlmError("train.precision fp16 needs a GPU, none is visible here: use bf16 or fp32.")
    return torch.device("cpu")
