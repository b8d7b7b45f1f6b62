"""Reads a checkpoint's manifest and validates it, as untrusted input, before any other file is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.checkpoints.errors import CheckpointError
from hvdlm.checkpoints.shards import Stored, from_json
from hvdlm.io import untrusted_input
from hvdlm.io.safe_files import entries
from hvdlm.io.untrusted_input import shown

_ANY_FORMAT = "hvdlm-checkpoint-"
FORMAT = f"{_ANY_FORMAT}3"
FORMAT_2 = f"{_ANY_FORMAT}2"  # of version 0.1: without branch and sequence
MANIFEST = "manifest.json"
LIMIT = 64 * 2**20  # bytes; hvdlm writes no larger manifest
_FILE = re.compile(r"[a-z]{1,32}(-[0-9]{1,9})?\.safetensors")
_WRITTEN = re.compile(rf"({_FILE.pattern}|{re.escape(MANIFEST)}|\..*\.partial)")  # all names in a checkpoint's folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BRANCH = re.compile(r"[0-9a-f]{16}")
_COUNT = 2**53  # JSON readers keep integers exact up to here
_TYPES: dict[str, tuple[type, str]] = {
    "config": (dict, "a mapping"),
    "cursor": (dict, "a mapping"),
    "versions": (dict, "a mapping"),
    "metrics": (dict, "a mapping"),
    "base": (dict, "a mapping"),
    "tokenizer": (str, "text"),
}


def read_manifest(path: Path, complete: bool = True) -> tuple[dict[str, Any], dict[str, list[Stored]]]:
    """Return the manifest of the checkpoint in ``path``, and the stored shards of its tensors by global name.

    The files that it names are regular files inside ``path`` with the sizes that it names; their hashes are not
    verified. Where ``complete`` is False some may be missing: they are on another node.

    Raises:
        CheckpointError: it is missing, foreign or damaged.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(path, f"it has no {MANIFEST}", "missing")
    try:
        if path.is_symlink():
            untrusted_input.inside(path, path.parent)
        manifest = untrusted_input.read_json(path / MANIFEST, LIMIT, within=path)
        _check(manifest)
        _check_files(path, manifest["files"], complete)
        return manifest, from_json(manifest["tensors"], manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else shown(_reason(error), 200)
        raise CheckpointError(path, reason) from error


def is_checkpoint(path: Path) -> bool:
    """Return whether hvdlm wrote the folder ``path``: its manifest's format tells, the names of files without one.

    Raises:
        OSError: it can't be read.
    """
    try:
        return untrusted_input.read_json(path / MANIFEST, LIMIT, within=path)["format"].startswith(_ANY_FORMAT)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):  # incomplete or damaged
        return all(_WRITTEN.fullmatch(file.name) for file in entries(path))


def _reason(error: Exception) -> str:
    return f"{Path(str(error.filename)).name}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _check(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json holds no mapping")
    if manifest.get("format") not in (FORMAT, FORMAT_2):
        raise ValueError(f"its format is {shown(repr(manifest.get('format')))}, not {FORMAT!r}")
    if manifest["format"] == FORMAT:
        _check_count(manifest["sequence"], "its sequence")
        if not isinstance(manifest["branch"], str) or not _BRANCH.fullmatch(manifest["branch"]):
            raise ValueError(f"its branch is {shown(repr(manifest['branch']))}")
    for name in ("step", "world_size"):
        _check_count(manifest[name], f"its {name}")
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
        _check_count(manifest["vocab"], "its vocab")
    for name, value in manifest.get("metrics", {}).items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= _COUNT):
            raise ValueError(f"its metric {shown(name)} is {shown(repr(value))}")
    for name, value in manifest.get("versions", {}).items():
        if not isinstance(value, str):
            raise ValueError(f"its version of {shown(name)} is {shown(repr(value))}")


def _check_count(value: Any, meaning: str) -> None:
    if type(value) is not int or not 0 <= value < _COUNT:  # isinstance would take a bool for an int
        raise ValueError(f"{meaning} is {shown(repr(value))}")


def _check_files(path: Path, files: Mapping[str, Any], complete: bool) -> None:
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"it names a file {shown(repr(name))}")
        _check_count(entry["bytes"], f"the size of {name}")
        expected = complete or os.path.lexists(path / name)
        if expected and untrusted_input.size(path / name, within=path) != entry["bytes"]:
            raise ValueError(f"{name} doesn't have the {entry['bytes']} bytes it was written with")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"it has no SHA-256 of {name}")
