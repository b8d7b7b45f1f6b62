"""Data sets of Hugging Face as they lie on disk: which files are theirs, and which of them are which split."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

VALIDATION = ("validation", "valid", "val", "dev")  # as the library calls it, the first that is there
_LIMIT = 1 << 24
_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}(-\w+)?\.parquet")


def choose(config: DataConfig) -> DataConfig:
    """Return ``config`` with the splits that it means in place of data sets of several.

    Raises:
        HvdlmError: there is no such split.
    """
    paths, held_out = [], list(config.validation_paths)
    for path in config.paths:
        found = _splits(Path(path))
        if found and config.split not in found:
            raise HvdlmError(
                f"data.path {path}: it has no split {config.split!r} (--data.split); {nearest(config.split, found)}"
            )
        paths += found[config.split] if found else [path]
        if config.validation_path is None:
            names = [name for name in VALIDATION if name in found and name != config.split]
            held_out += found[names[0]] if names else []
    held_out = [split for path in held_out for split in _held_out(path)]
    return replace(config, path=paths, validation_path=held_out or None)


def _held_out(path: str) -> list[str]:
    """Return the validation split of a data set that was named as validation text."""
    found = _splits(Path(path))
    names = [name for name in VALIDATION if name in found]
    return found[names[0]] if names else [path]


def _splits(folder: Path) -> dict[str, list[str]]:
    """Return the paths of each split: of what ``DatasetDict.save_to_disk`` wrote, or shards named by their split."""
    if (folder / "dataset_dict.json").is_file():
        said = _read(folder / "dataset_dict.json", "splits")
        return {name: [str(folder / name)] for name in said if (folder / name).is_dir()}
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")) if folder.is_dir() else []:
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match[1], []).append(str(path))
    return found if len(found) > 1 else {}


def strays(folder: Path) -> set[Path]:
    """Return Arrow files that lie beside a data set without being of it: caches, or of what was saved there before."""
    found: set[Path] = set()
    for state in folder.rglob("state.json"):
        files = set(state.parent.glob("*.arrow"))
        if files and (said := _read(state, "_data_files", "filename")):
            found |= files - {state.parent / name for name in said}
    return found


def check_one(folder: Path) -> None:
    """Refuse a folder with several splits below it: they'd be read as one text.

    Raises:
        HvdlmError: it is one.
    """
    for path in sorted(folder.rglob("dataset_dict.json")):
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir())
        raise HvdlmError(
            f"data.path {folder}: {path.parent} holds the splits {shown(', '.join(names))} of a data set: name it, or "
            f"one of them, for example --data.path {path.parent / (names[0] if names else 'train')}."
        )


def _read(path: Path, key: str, name: str | None = None) -> list[str]:
    """Return the names in a list of one of the library's JSON files."""
    try:
        said: Any = untrusted_input.read_json(path, _LIMIT).get(key, [])
        names = [one if name is None else one[name] for one in said]
        if not all(isinstance(one, str) and Path(one).name == one and one not in ("", "..") for one in names):
            raise ValueError(f"its {key} are {shown(repr(said))}")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HvdlmError(
            f"data.path {path}: is damaged or not of a data set of Hugging Face ({shown(repr(error))}): save it anew."
        ) from error
