"""The framework plugin for TensorFlow: makes tensors and builds Trainables."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.world import World
from hvdlm_language.axis_groups import make_axes
from hvdlm_tensorflow import devices
from hvdlm_tensorflow.horovod import Horovod
from hvdlm_tensorflow.host_tensors import HostTensors
from hvdlm_tensorflow.trainable import Trainable


class Framework:
    """Implements ``Framework`` for ``tensorflow``."""

    name = "tensorflow"
    in_place = False  # its tensors can't be overwritten
    abilities = ("groups", "muon", "ema", "zero3", "context_ranks", "document_masks")

    def __init__(self) -> None:
        devices.provide_threads()  # before its first tensor
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
        # TensorFlow would warn that a graph is traced several times: once for each of the few shapes of batches.
        tf.get_logger().setLevel("ERROR")
        devices.select(world, config)
        shard = make_model_shard(model, mesh, world.rank, config.parallel)
        axes = make_axes(world, mesh, shard)
        return Trainable(model, shard, axes, exchange, config, mesh, world.rank, optimizer)

    def tensor(self, array: np.ndarray) -> tf.Tensor:
        """Return a copy of ``array`` on the device."""
        return tf.constant(array)
