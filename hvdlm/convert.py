"""Merges a checkpoint's parameters, however many ranks wrote them, into one safetensors file under global names."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np

from hvdlm.checkpoint import Checkpoint
from hvdlm.interfaces import HvdlmError
from hvdlm.models.layout import whole


def convert(checkpoint: Checkpoint, output: Path) -> int:
    """Write the parameters to ``output``, no more than one of them in memory; return how many numbers they are.

    The file is whole or not there: it is written under a temporary name beside it.

    Raises:
        HvdlmError: the checkpoint lacks something or is damaged, or the file can't be written.
    """
    temporary = output.parent / f".{output.name}.partial"
    try:
        if output.is_dir():  # asked before there is much to write, not after
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            count = _write(checkpoint, temporary)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
        descriptor = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a file in a folder that is there, can be written and "
            "has space."
        ) from error
    return count


def _write(checkpoint: Checkpoint, path: Path) -> int:
    """Write https://github.com/huggingface/safetensors#format: the header's length, the header, the arrays."""
    # Wider numbers first, so that all lie at multiples of their size.
    stored = {name: s[0] for name, s in checkpoint.tensors.items() if name.startswith("parameters/")}
    names = sorted(stored, key=lambda name: (-stored[name].numpy.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "hvdlm", "step": str(checkpoint.step)}}
    end = count = 0
    for name in names:
        shape = stored[name].piece.shape
        begin, end = end, end + math.prod(shape) * stored[name].numpy.itemsize
        count += math.prod(shape)
        header[name.removeprefix("parameters/")] = {
            "dtype": stored[name].dtype,
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    reader = checkpoint.reader()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = reader.piece(name, whole(stored[name].piece.shape))
            # Little-endian is what the format asks for.
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B") if array.size else b"")
        file.flush()
        os.fsync(file.fileno())
    return count
