"""Safetensors files: the one writer (tensor by tensor, hashed on the way, synced to disk), and the one opener."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sync, sync_folder

_HEADER = 100 * 10**6  # the longest header that safetensors allows
_CHUNK = 4 * 2**20  # what is hashed and written in one go: it stays in the processor's cache between the two


Described = tuple[str, tuple[int, ...]]
"""A tensor before it is there: its dtype as safetensors calls it (``F32``), and its shape."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Described],
    array: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write ``array(name)`` of all ``tensors``, one at a time, and sync; return {"bytes", "sha256"} of the file.

    https://github.com/huggingface/safetensors#format: the header's length, the header, the arrays.
    """
    # Wider numbers first, so that all lie at multiples of their size.
    names = sorted(tensors, key=lambda name: (-_bits(tensors[name][0]), name))
    header = _header({name: tensors[name] for name in names}, metadata)
    size, digest = len(header), hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            data = _bytes(array(name))
            size += len(data)
            for start in range(0, len(data), _CHUNK):
                digest.update(data[start : start + _CHUNK])
                file.write(data[start : start + _CHUNK])
        sync(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def replace_tensors(
    path: Path, tensors: Mapping[str, Described], array: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the file ``path`` as ``write_tensors`` does, under a temporary name beside it: it is whole or not there."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write_tensors(temporary, tensors, array, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def open_tensors(path: Path, within: Path) -> Any:
    """Return the open safetensors file ``path``, which may not be a link that leads out of the folder ``within``.

    Raises:
        ValueError, OSError: it is something else, or the library stumbles over it.
    """
    from safetensors import safe_open

    size = untrusted_input.size(path, within=within)
    with path.open("rb") as file:  # before the library sees it
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _HEADER):
        raise ValueError(f"its header is said to have {length:,} bytes")
    return untrusted_input.guarded(lambda: safe_open(str(path), framework="numpy"))


def bytes_of(tensor: Described) -> int:
    """Return the bytes of a tensor's numbers."""
    return math.prod(tensor[1]) * _bits(tensor[0]) // 8


def _bits(dtype: str) -> int:
    return 8 if dtype == "BOOL" else int(dtype.lstrip("IUF"))


def _header(tensors: Mapping[str, Described], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + bytes_of((dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(array: np.ndarray) -> memoryview:
    """Return an array's numbers in row-major order, little-endian as the format wants, copied if they aren't so."""
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data if flat.size else memoryview(b"")
