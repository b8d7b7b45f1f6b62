"""Data sets on disk: finds the files of their splits, and says which are used."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import corpus_files
from hvdlm_corpora.progress_bar import note

VALIDATION = ("validation", "valid", "val", "dev")
"""Names of a validation split in the library, in the order of preference."""

TRAIN = "train"
_SAME = {"training": TRAIN, "testing": "test", "eval": "test", "evaluation": "test"}
_NAMES = "|".join([TRAIN, *VALIDATION, "test", *_SAME])
NAMED = re.compile(rf"(?:^|[^a-z])({_NAMES})(?:[^a-z]|$)")
"""Finds the name of a split in the name of a file."""

_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}(-\w+)?\.parquet")
_ALL = ""  # in place of a split's name: a corpus that has no splits


def choose(config: DataConfig) -> DataConfig:
    """Return ``config`` with the files of the selected splits in place of folders and patterns; print what was chosen.

    Raises:
        HvdlmError: a path names nothing readable, or a data set lacks the split.
    """
    paths: list[str] = []
    held_out: list[str] = []
    for path in config.paths:
        files, notes = _find_splits(path, config)
        name, validation = training_split(path, files, config)
        paths += files[name]
        held_out += [file for split in validation for file in files[split]]
        _print_choice(path, files, [name], validation, notes)
    for path in config.validation_paths:
        files, notes = _find_splits(path, config)
        names = held_out_splits(files)
        held_out += [file for split in names for file in files[split]]
        _print_choice(path, files, [], names, notes)
    for sentence in corpus_files.incomplete_sets({*paths, *held_out}):
        note(sentence)
    return replace(config, path=paths, validation_path=held_out or None)


def training_split(path: str, files: Mapping[str, list[str]], config: DataConfig) -> tuple[str, list[str]]:
    """Return the names of the split of ``data.path`` to train on and, in a list, of the one to validate with, if any.

    Raises:
        HvdlmError: the data set lacks the split.
    """
    name = _ALL if _ALL in files else config.split
    if name not in files:
        raise HvdlmError(
            f"data.path {path}: it has no split {config.split!r} (--data.split); {nearest(config.split, files)}"
        )
    return name, validation_split(files, {config.split}) if config.validation_path is None else []


def held_out_splits(files: Mapping[str, list[str]]) -> list[str]:
    """Return the names of the splits of ``data.validation_path`` to validate with."""
    return validation_split(files, set()) or list(files)


def validation_split(files: Mapping[str, list[str]], others: Container[str]) -> list[str]:
    """Return the name of the validation split in a list, empty where there is none."""
    return [name for name in VALIDATION if name in files and name not in others][:1]


def _find_splits(path: str, config: DataConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Return the files of each split, or all under one name where there are no splits, and phrases on other files."""
    listing = Path(path) / "dataset_dict.json"
    if listing.is_file():
        names = [name for name in corpus_files.listed_names(listing, "splits") if (Path(path) / name).is_dir()]
        folders = {name: corpus_files.find(str(Path(path) / name), config.record_field) for name in names}
        return {name: one.files for name, one in folders.items()}, [n for one in folders.values() for n in one.notes]
    files, notes = corpus_files.find(path, config.record_field)
    if not os.path.isdir(path):
        return {_ALL: files}, notes
    splits = _by_shard(files) or by_name(path, files)
    if len(splits) < 2 or (splits.keys().isdisjoint((TRAIN, config.split)) and not _by_shard(files)):
        return {_ALL: files}, notes
    rest = len(files) - sum(map(len, splits.values()))
    return splits, [*notes, *([f"{rest:,} that belong to no split"] if rest else [])]


def _by_shard(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the Parquet files that ``push_to_hub`` names by their split; empty where they are of one split."""
    splits: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        if match := _SHARD.fullmatch(os.path.basename(file)):
            splits[match[1]].append(file)
    return dict(splits) if len(splits) > 1 else {}


def by_name(folder: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files whose name, or else the nearest folder's below ``folder``, has the name of a split in it."""
    splits: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        names = reversed(Path(os.path.relpath(file, folder)).parts)
        matches = [match[1] for name in names if (match := NAMED.search(name.lower()))]
        if matches:
            splits[_SAME.get(matches[0], matches[0])].append(file)
    return dict(splits)


def _print_choice(
    path: str, files: dict[str, list[str]], train: Sequence[str], validation: Sequence[str], notes: Sequence[str]
) -> None:
    """Print which splits are used and what is left out; nothing where all is read."""
    phrases = []
    if _ALL not in files:
        uses = {"training": train, "validation": validation}
        phrases += [f"{use} split {name} ({len(files[name]):,} files)" for use, names in uses.items() for name in names]
        unused = [name for name in files if name not in (*train, *validation)]
        notes = [*notes, *([f"split {', '.join(unused)}"] if unused else [])]
    elif notes:
        phrases.append(f"{len(files[_ALL]):,} files")
    if notes:
        phrases.append(f"not read: {'; '.join(notes)}")
    if phrases:
        note(f"data.path {path}: {shown(', '.join(phrases), 500)}")
