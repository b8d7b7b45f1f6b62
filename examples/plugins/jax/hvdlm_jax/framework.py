"""The framework plugin for JAX: makes tensors and builds Trainables."""

from __future__ import annotations

import jax
import numpy as np

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.world import World
from hvdlm_jax.plugin import check_precision
from hvdlm_jax.trainable import Trainable

# Tensors keep their dtypes: without this, JAX turns float64 (loss sums) and int64 into 32 bits.
jax.config.update("jax_enable_x64", True)
# The models add vectors to matrices, whatever JAX_NUMPY_RANK_PROMOTION says of other programs.
jax.config.update("jax_numpy_rank_promotion", "allow")


class Framework:
    """Implements ``Framework`` for ``jax``. Arrays on CPUs are host memory, so that it needs no ``host_tensors``."""

    name = "jax"
    in_place = False  # arrays are immutable

    def resolve(self, config: Config, spec: ModelSpec, world: World) -> Resolved:
        """Return what ``auto`` stands for: fp32, and steps that are always compiled."""
        return Resolved(device="CPU", precision="fp32", compile=True)

    def build(
        self,
        model: ModelSpec,
        mesh: Mesh,
        world: World,
        exchange: Exchange,
        config: Config,
        optimizer: Optimizer | None = None,
    ) -> Trainable:
        """Return the model at its initial values; ``optimizer``: that of a plugin."""
        check_precision(config)
        return Trainable(model, mesh, world, exchange, config, optimizer)

    def tensor(self, array: np.ndarray) -> jax.Array:
        """Return ``array`` as an array of JAX."""
        return jax.numpy.asarray(array)
