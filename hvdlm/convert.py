"""Merges a checkpoint's parameters, however many ranks wrote them, into one safetensors file under global names."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np

from hvdlm.checkpoints.checkpoint import Checkpoint
from hvdlm.checkpoints.pieces import key
from hvdlm.checkpoints.tensors import replace_tensors
from hvdlm.interfaces import HvdlmError
from hvdlm.models.layout import whole


def convert(checkpoint: Checkpoint, output: Path) -> int:
    """Write the parameters to ``output``, no more than one of them in memory; return how many numbers they are.

    The file is whole or not there.

    Raises:
        HvdlmError: the checkpoint lacks something or is damaged, or the file can't be written.
    """
    try:
        if output.is_dir():  # asked before there is much to write, not after
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return _write(checkpoint, output)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a file in a folder that is there, can be written and "
            "has space."
        ) from error


def _write(checkpoint: Checkpoint, path: Path) -> int:
    stored = {key(name): found[0] for name, found in checkpoint.tensors.items() if name.startswith("parameters/")}
    tensors = {name: (one.dtype, one.piece.shape) for name, one in stored.items()}
    reader = checkpoint.reader()

    def array(name: str) -> np.ndarray:
        return reader.piece(f"parameters/{name}", whole(stored[name].piece.shape))

    replace_tensors(path, tensors, array, {"format": "hvdlm", "step": str(checkpoint.step)})
    return sum(math.prod(shape) for _, shape in tensors.values())
