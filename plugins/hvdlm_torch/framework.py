"""The framework plugin for PyTorch: makes tensors and builds Trainables."""

from __future__ import annotations

import numpy as np
import torch

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.world import World
from hvdlm_language.axis_groups import make_axes
from hvdlm_torch import devices
from hvdlm_torch.horovod import Horovod
from hvdlm_torch.host_tensors import HostTensors
from hvdlm_torch.trainable import Trainable


class Framework:
    """Implements ``Framework`` for ``torch``."""

    name = "torch"
    in_place = True  # an all-reduce overwrites the tensor that it sums
    abilities = ("groups", "muon", "ema", "zero3", "context_ranks", "document_masks", "activation_offload")

    def __init__(self) -> None:
        self.host_tensors = HostTensors()
        self.horovod = Horovod()

    def resolve(self, config: Config, spec: ModelSpec, world: World) -> Resolved:
        """Select this rank's device; return what the rank computes with."""
        return devices.resolve(config, spec, world)

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
        device = devices.select(world, config)
        shard = make_model_shard(model, mesh, world.rank, config.parallel)
        axes = make_axes(world, mesh, shard)
        return Trainable(model, shard, axes, exchange, config, device, mesh, world.rank, optimizer)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return ``array`` on the current device; on a CPU, the tensor shares its memory."""
        half = array.dtype.name == "bfloat16"  # a type of ml_dtypes, of which PyTorch takes the bits
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(array)
        return tensor.to("cuda" if torch.cuda.is_available() else "cpu")
