"""Merges a checkpoint's parameters, however many ranks wrote them, into one safetensors file under global names."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.merge import Weights
from hvdlm.checkpoints.rebuild_spec import spec_of
from hvdlm.checkpoints.safetensors_io import replace_tensors
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import builtin_models


def convert(checkpoint: Checkpoint, output: Path, base: str | None = None) -> int:
    """Write the parameters to ``output``, no more than one of them in memory; return how many numbers they are.

    The file is whole or not there. Adapters are added to what they were trained on, which lies in ``base``, or where
    the checkpoint says.

    Raises:
        HvdlmError: the checkpoint lacks something or is damaged, or the file can't be written.
    """
    try:
        if output.is_dir():  # asked before there is much to write, not after
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        spec = spec_of(checkpoint, builtin_models(), base) if "base" in checkpoint.manifest else None
        return _write(Weights(checkpoint, spec), checkpoint.step, output)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a file in a folder that is there, can be written and "
            "has space."
        ) from error


def _write(weights: Weights, step: int, path: Path) -> int:
    replace_tensors(path, weights.tensors, weights.array, {"format": "hvdlm", "step": str(step)})
    return sum(math.prod(shape) for _, shape in weights.tensors.values())
