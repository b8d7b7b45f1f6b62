"""A checkpoint's whole weights by name: those that it holds, or what its adapters and what is frozen add up to."""

from __future__ import annotations

import numpy as np

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.safetensors_io import Described
from hvdlm.checkpoints.shards import key
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import whole

_PARAMETERS = "parameters/"


class Weights:
    """The weights of a checkpoint; ``spec``: its model, needed where it holds adapters.

    Attributes:
        tensors: of every weight its dtype and shape.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec | None) -> None:
        self._reader, self._added = checkpoint.reader(), {one.weight: one for one in spec.adapters} if spec else {}
        self._frozen = {param.name: param for param in spec.frozen} if spec else {}
        self.tensors: dict[str, Described] = {name: ("F32", param.shape) for name, param in self._frozen.items()}
        self._stored = {key(n): found[0] for n, found in checkpoint.tensors.items() if n.startswith(_PARAMETERS)}
        if not self._frozen:
            self.tensors = {name: (one.dtype, one.shard.shape) for name, one in self._stored.items()}

    def array(self, name: str) -> np.ndarray:
        """Return a weight.

        Raises:
            HvdlmError: a file of the checkpoint, or of the folder that it was trained from, is damaged.
        """
        if name not in self._frozen:
            return self._read(name)
        param, one = self._frozen[name], self._added.get(name)
        array = param.initial_box(0, whole(param.shape).slices)
        if one is not None:
            down, up = self._read(one.down), self._read(one.up)
            array += one.factor * (down @ up.reshape(len(up), -1)).reshape(array.shape)
        return array

    def _read(self, name: str) -> np.ndarray:
        return self._reader.shard(f"{_PARAMETERS}{name}", whole(self._stored[name].shard.shape))
