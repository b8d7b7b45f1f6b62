"""Hugging Face data sets on disk: finds the files of their splits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

VALIDATION = ("validation", "valid", "val", "dev")
"""Names of a validation split in the library, in the order of preference."""

_LIMIT = 1 << 24  # bytes of a JSON file
_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}(-\w+)?\.parquet")


def choose(config: DataConfig) -> DataConfig:
    """Return ``config`` with the paths of the selected splits in place of data sets that have several.

    Raises:
        HvdlmError: a data set lacks the split.
    """
    paths, held_out = [], list(config.validation_paths)
    for path in config.paths:
        splits = _splits(Path(path))
        if splits and config.split not in splits:
            raise HvdlmError(
                f"data.path {path}: it has no split {config.split!r} (--data.split); {nearest(config.split, splits)}"
            )
        paths += splits[config.split] if splits else [path]
        if config.validation_path is None:
            names = [name for name in VALIDATION if name in splits and name != config.split]
            held_out += splits[names[0]] if names else []
    held_out = [split for path in held_out for split in _validation_split(path)]
    return replace(config, path=paths, validation_path=held_out or None)


def _validation_split(path: str) -> list[str]:
    """Return the paths of the validation split of a data set, or ``path`` where it has none."""
    splits = _splits(Path(path))
    names = [name for name in VALIDATION if name in splits]
    return splits[names[0]] if names else [path]


def _splits(folder: Path) -> dict[str, list[str]]:
    """Return the paths of each split: folders of ``DatasetDict.save_to_disk``, or shard files named by their split."""
    if (folder / "dataset_dict.json").is_file():
        names = _read(folder / "dataset_dict.json", "splits")
        return {name: [str(folder / name)] for name in names if (folder / name).is_dir()}
    shards: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")) if folder.is_dir() else []:
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault(match[1], []).append(str(path))
    return shards if len(shards) > 1 else {}


def unrelated_files(folder: Path) -> set[Path]:
    """Return the Arrow files in a data set's folder that it doesn't list: caches, or left from an earlier save."""
    unrelated: set[Path] = set()
    for state in folder.rglob("state.json"):
        files = set(state.parent.glob("*.arrow"))
        if files and (names := _read(state, "_data_files", "filename")):
            unrelated |= files - {state.parent / name for name in names}
    return unrelated


def check_one(folder: Path) -> None:
    """Check that a folder doesn't contain a data set of several splits, which would be read as one text.

    Raises:
        HvdlmError: it does.
    """
    for path in sorted(folder.rglob("dataset_dict.json")):
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir())
        raise HvdlmError(
            f"data.path {folder}: {path.parent} holds the splits {shown(', '.join(names))} of a data set: name it, or "
            f"one of them, for example --data.path {path.parent / (names[0] if names else 'train')}."
        )


def _read(path: Path, key: str, name: str | None = None) -> list[str]:
    """Return the file names that a JSON file of the library lists under ``key``; ``name``: their key in its entries."""
    try:
        entries: Any = untrusted_input.read_json(path, _LIMIT).get(key, [])
        names = [entry if name is None else entry[name] for entry in entries]
        if not all(isinstance(n, str) and Path(n).name == n and n not in ("", "..") for n in names):
            raise ValueError(f"its {key} are {shown(repr(entries))}")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HvdlmError(
            f"data.path {path}: is damaged or not of a Hugging Face data set ({shown(repr(error))}): save it again."
        ) from error
