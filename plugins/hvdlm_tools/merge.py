"""Merges a checkpoint's weights from the shards of all ranks, and adapters into their base weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.safetensors_io import TensorInfo, write_tensors
from hvdlm.checkpoints.shards import key
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files
from hvdlm.io.atomic_files import sync_folder
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import whole
from hvdlm_language.rebuild_spec import spec_of

_PARAMETERS = "parameters/"


class MergedWeights:
    """A checkpoint's weights; ``spec``: its model, needed where it holds adapters.

    Attributes:
        tensors: every weight's dtype and shape, by name.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec | None) -> None:
        self._reader = checkpoint.reader()
        self._adapters = {adapter.weight: adapter for adapter in spec.adapters} if spec else {}
        self._frozen = {param.name: param for param in spec.frozen} if spec else {}
        self._stored = {key(n): shards[0] for n, shards in checkpoint.tensors.items() if n.startswith(_PARAMETERS)}
        self.tensors: dict[str, TensorInfo] = {}
        if self._frozen:
            self.tensors = {name: ("F32", param.shape) for name, param in self._frozen.items()}
        else:
            self.tensors = {name: (stored.dtype, stored.shard.shape) for name, stored in self._stored.items()}

    def array(self, name: str) -> np.ndarray:
        """Return a weight, with its adapter's product added where it has one.

        Raises:
            HvdlmError: a file of the checkpoint, or of the folder of its base weights, is damaged.
        """
        if name not in self._frozen:
            return self._read(name)
        param = self._frozen[name]
        adapter = self._adapters.get(name)
        array = param.initial_box(0, whole(param.shape).slices)
        if adapter is not None:
            down, up = self._read(adapter.down), self._read(adapter.up)
            array += adapter.factor * (down @ up.reshape(len(up), -1)).reshape(array.shape)
        return array

    def _read(self, name: str) -> np.ndarray:
        return self._reader.read(f"{_PARAMETERS}{name}", whole(self._stored[name].shard.shape))


def convert(checkpoint: Checkpoint, output: Path, base: str | None = None) -> int:
    """Write a checkpoint's parameters into one safetensors file under global names; return the number of elements.

    One parameter at a time is in memory, and ``output`` is whole or absent. Adapters are added to their base weights,
    which are in the folder ``base``, or where the checkpoint says.

    Raises:
        HvdlmError: the checkpoint lacks something or is damaged, or the file can't be written.
    """
    try:
        spec = spec_of(checkpoint, base) if "base" in checkpoint.manifest else None
        weights = MergedWeights(checkpoint, spec)
        metadata = {"format": "hvdlm", "step": str(checkpoint.step)}
        replace_tensors(output, weights.tensors, weights.array, metadata)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a file in an existing, writable folder with enough "
            "space."
        ) from error
    return sum(math.prod(shape) for _, shape in weights.tensors.values())


def replace_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], array: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the file ``path`` as ``write_tensors`` does, atomically, under a temporary name beside it."""
    temporary = path.with_name(f".{path.name}.partial")  # the caller holds the lock of its output
    try:
        write_tensors(temporary, tensors, array, metadata)
        safe_files.move(temporary, path)
    finally:
        safe_files.delete_file(temporary)
    sync_folder(path.parent)
