"""Reads a checkpoint's manifest, which may hold anything, and checks it before anything else is believed or opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.shards import Stored, from_json
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

FORMAT = "hvdlm-checkpoint-2"
_LIMIT = 64 * 2**20  # a manifest larger than this is none of ours
_FILE = re.compile(r"[a-z]{1,32}(-[0-9]{1,9})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNT = 2**53
_TYPES: dict[str, tuple[type, str]] = {
    "config": (dict, "a mapping"),
    "cursor": (dict, "a mapping"),
    "versions": (dict, "a mapping"),
    "metrics": (dict, "a mapping"),
    "base": (dict, "a mapping"),
    "tokenizer": (str, "text"),
}


def read_manifest(path: Path, complete: bool = True) -> tuple[dict[str, Any], dict[str, list[Stored]]]:
    """Return the manifest of the checkpoint in ``path`` and where pieces of its tensors lie, by global name.

    The files that it names are there, regular, of the sizes it says, and in ``path``; their hashes are not verified.
    Where ``complete`` is False some may be missing: they lie on another node.

    Raises:
        HvdlmError: it is missing, foreign or damaged.
    """
    if not (path / "manifest.json").is_file():
        raise HvdlmError(
            f"{path} is no hvdlm checkpoint: it has no manifest.json. Name a folder like RUN/checkpoints/step-..."
        )
    try:
        if path.is_symlink():
            untrusted_input.inside(path, path.parent)
        manifest = untrusted_input.read_json(path / "manifest.json", _LIMIT, within=path)
        _check(manifest)
        _check_files(path, manifest["files"], complete)
        return manifest, from_json(manifest["tensors"], manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else shown(_reason(error), 200)
        raise HvdlmError(f"checkpoint {path} is damaged or foreign: {why}. Resume from another one.") from error


def _reason(error: Exception) -> str:
    return f"{Path(str(error.filename)).name}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _check(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json holds no mapping")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {shown(repr(manifest.get('format')))}, not {FORMAT!r}")
    for name in ("step", "world_size"):
        _count(manifest[name], f"its {name}")
    if manifest["world_size"] == 0:
        raise ValueError("its world_size is 0")
    for name in ("files", "tensors"):
        if not isinstance(manifest[name], dict):
            raise ValueError(f"its {name} are no mapping")
    for name, (kind, expected) in _TYPES.items():
        if not isinstance(manifest.get(name, kind()), kind):
            raise ValueError(f"its {name} is {shown(manifest[name])}, not {expected}")
    _check_figures(manifest)


def _check_figures(manifest: Mapping[str, Any]) -> None:
    mesh = manifest.get("mesh", [1])
    if not isinstance(mesh, list) or not 0 < len(mesh) <= 8 or not all(type(n) is int and 0 < n < _COUNT for n in mesh):
        raise ValueError(f"its mesh is {shown(mesh)}")
    if "vocab" in manifest:
        _count(manifest["vocab"], "its vocab")
    for name, value in manifest.get("metrics", {}).items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= _COUNT):
            raise ValueError(f"its metric {shown(name)} is {shown(repr(value))}")
    for name, value in manifest.get("versions", {}).items():
        if not isinstance(value, str):
            raise ValueError(f"its version of {shown(name)} is {shown(repr(value))}")


def _count(value: Any, what: str) -> None:
    if type(value) is not int or not 0 <= value < _COUNT:  # bool is an int to isinstance
        raise ValueError(f"{what} is {shown(repr(value))}")


def _check_files(path: Path, files: Mapping[str, Any], complete: bool) -> None:
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"it names a file {shown(repr(name))}")
        _count(entry["bytes"], f"the size of {name}")
        here = complete or os.path.lexists(path / name)
        if here and untrusted_input.size(path / name, within=path) != entry["bytes"]:
            raise ValueError(f"{name} has not the {entry['bytes']} bytes it was written with")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"it has no SHA-256 of {name}")
