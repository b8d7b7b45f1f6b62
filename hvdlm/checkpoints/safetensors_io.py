"""Writes safetensors files (tensor by tensor, hashed while writing, synced to disk) and opens untrusted ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.io import safe_files, untrusted_input
from hvdlm.io.atomic_files import sync

_MAX_HEADER = 100 * 10**6  # bytes; the limit of the safetensors library
_CHUNK = 4 * 2**20  # bytes that are hashed and then written: they stay in the processor's cache between the two
_SYNC_BYTES = 2**28  # after which a file is synced: a single sync of all would show no progress for minutes

TensorInfo = tuple[str, tuple[int, ...]]
"""A tensor's dtype, by its name in safetensors (``F32``), and its shape."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    array: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Write ``array(name)`` for all ``tensors``, one at a time, and sync; return {"bytes", "sha256"} of the file.

    ``progress`` is called after every few MB that the file system has accepted.
    https://github.com/huggingface/safetensors#format: the header's length, the header, the arrays.
    """
    # Wider elements first, so that every array is aligned to its element size.
    names = sorted(tensors, key=lambda name: (-_bits(tensors[name][0]), name))
    header = _header({name: tensors[name] for name in names}, metadata)
    size, digest = len(header), hashlib.sha256(header)
    with safe_files.create(path) as file:
        file.write(header)
        for name in names:
            data = _bytes(array(name))
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                if size // _SYNC_BYTES != (size + len(chunk)) // _SYNC_BYTES:
                    sync(file)
                size += len(chunk)
                progress()
        sync(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def open_tensors(path: Path, within: Path) -> Any:
    """Return the open safetensors file ``path``, which may not be a link to a file outside of the folder ``within``.

    Raises:
        ValueError, OSError: it is not a regular file, or the library fails on it.
    """
    from safetensors import safe_open

    size = untrusted_input.size(path, within=within)
    with path.open("rb") as file:  # checked before the library allocates what the header asks for
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header claims to have {length:,} bytes")
    return untrusted_input.guarded(lambda: safe_open(str(path), framework="numpy"))


def bytes_of(tensor: TensorInfo) -> int:
    """Return the size of a tensor's elements in bytes."""
    return math.prod(tensor[1]) * _bits(tensor[0]) // 8


def _bits(dtype: str) -> int:
    return 8 if dtype == "BOOL" else int(dtype.lstrip("IUF"))


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + bytes_of((dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(array: np.ndarray) -> memoryview:
    """Return an array's elements in row-major order and little-endian, as the format wants, copied if need be."""
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")
