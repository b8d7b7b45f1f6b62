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
from hvdlm.io.value_checks import count, fields, list_of, mapping_of, number, text

_ANY_FORMAT = "hvdlm-checkpoint-"
FORMAT = f"{_ANY_FORMAT}3"
FORMAT_2 = f"{_ANY_FORMAT}2"  # of version 0.1: without branch and sequence
MANIFEST = "manifest.json"
LIMIT = 64 * 2**20  # bytes; hvdlm writes no larger manifest
_FILE = re.compile(r"[a-z]{1,32}(-[0-9]{1,9})?\.safetensors")
_WRITTEN = re.compile(rf"({_FILE.pattern}|{re.escape(MANIFEST)}|\..*\.partial)")  # all names in a checkpoint's folder
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BRANCH = re.compile(r"[0-9a-f]{16}")
_ROWS = count(high=2**52)  # twice this many still fit into an int64
_RANGES = 10_000  # of rows that are left out; every step looks at all of them
_CURSOR = fields(
    {"rows": _ROWS, "left_out": list_of(list_of(_ROWS, 2, 2), most=_RANGES)}, {"batch_size": count(1, 2**52)}
)
_SCHEMA = fields(
    {
        "step": count(high=2**52),
        "world_size": count(1),
        "files": mapping_of(fields({"bytes": count(), "sha256": text})),
        "tensors": mapping_of(),
    },
    {
        "config": mapping_of(),
        "cursor": _CURSOR,
        "guard": fields({}, {"mean_norm": number(0), "steps": count()}),
        "versions": mapping_of(text),
        "metrics": mapping_of(number(finite=False)),
        "base": fields({"weights": text, "factor": number()}),
        "tokenizer": text,
        "data": text,
        "device": text,
        "vocab": count(),
        "mesh": list_of(count(1), 1, 8),
    },
)
_BRANCHED = fields({"sequence": count(high=2**53 - 1), "branch": text})


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
    _SCHEMA(manifest, "")
    if manifest["format"] == FORMAT:
        _BRANCHED(manifest, "")
        if not _BRANCH.fullmatch(manifest["branch"]):
            raise ValueError(f"its branch is {shown(repr(manifest['branch']))}")


def _check_files(path: Path, files: Mapping[str, Any], complete: bool) -> None:
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"it names a file {shown(repr(name))}")
        expected = complete or os.path.lexists(path / name)
        if expected and untrusted_input.size(path / name, within=path) != entry["bytes"]:
            raise ValueError(f"{name} doesn't have the {entry['bytes']} bytes it was written with")
        if not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"it has no SHA-256 of {name}")
