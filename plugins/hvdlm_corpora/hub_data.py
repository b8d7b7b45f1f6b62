"""Data sets of the Hugging Face Hub by name: ``hf:NAME``, ``hf:OWNER/NAME@REVISION`` or ``hf:OWNER/NAME/CONFIG``.

A data set's README.md begins with YAML that describes its configurations: their names, and the files of each split
(https://huggingface.co/docs/hub/datasets-manual-configuration).
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yaml import safe_load

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import safe_yaml, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import corpus_files, hub, splits
from hvdlm_corpora.progress_bar import note

PREFIX = "hf:"
_README, _README_BYTES = "README.md", 1 << 20
_FILES = tuple(f"*{suffix}" for suffix in (*corpus_files.SUFFIXES, ".bin", ".idx"))
_ADVICE = "name it as on the hub, for example hf:Salesforce/wikitext/wikitext-2-raw-v1"


@dataclass(frozen=True)
class _Files:
    """A data set's ``folder`` and, where its README lists them, the files of each split."""

    folder: Path
    splits: dict[str, list[str]] | None


def local(config: DataConfig) -> DataConfig:
    """Return ``config`` with folders and files of the cache in place of data sets of the hub.

    Raises:
        HvdlmError: one can't be had, or lacks the split or the configuration.
    """
    if not any(path.startswith(PREFIX) for path in (*config.paths, *config.validation_paths)):
        return config
    paths: list[str] = []
    held_out: list[str] = []
    for path in config.paths:
        named = _files(path, "data.path")
        if named is None:
            paths.append(path)
        elif named.splits is None:
            paths.append(str(named.folder))
        else:
            name, names = splits.training_split(path, named.splits, config)
            paths += named.splits[name]
            held_out += [file for split in names for file in named.splits[split]]
            note(f"data.path {path}: training split {name}" + "".join(f", validation split {n}" for n in names))
    for path in config.validation_paths:
        named = _files(path, "data.validation_path")
        if named is None or named.splits is None:
            held_out.append(path if named is None else str(named.folder))
        else:
            names = splits.held_out_splits(named.splits)
            held_out += [file for split in names for file in named.splits[split]]
    return replace(config, path=paths, validation_path=held_out or None)


def _files(path: str, option: str) -> _Files | None:
    """Return what a name of the hub stands for; None: ``path`` is none.

    Raises:
        HvdlmError: it can't be had.
    """
    if not path.startswith(PREFIX):
        return None
    names = path.removeprefix(PREFIX).split("/")
    revision = next((name.partition("@")[2] for name in names[:2] if "@" in name), "")
    names = [name.partition("@")[0] for name in names]
    repository = hub.named("/".join(names[:2]) + (f"@{revision}" if revision else ""))
    if repository is None:
        raise HvdlmError(f"{option} {path}: this is no name of a data set: {_ADVICE}.")
    try:
        return _chosen(path, repository, "/".join(names[2:]))
    except hub.Unavailable as error:
        raise HvdlmError(f"{option} {path}: {error}") from error.__cause__


def _chosen(path: str, repository: hub.Repository, name: str) -> _Files:
    """Return the files of a configuration, or of a folder of the data set; "": of its only or default configuration."""
    configurations = _configurations(path, hub.snapshot("dataset", repository, (_README,)))
    if not name and configurations:
        defaults = [key for key, value in configurations.items() if value.default or key == "default"]
        names = defaults if len(defaults) == 1 else list(configurations)
        if len(names) > 1:
            raise HvdlmError(
                f"{path} has the configurations {shown(', '.join(configurations), 200)}: name one, for example "
                f"{path}/{names[0]}."
            )
        name = names[0]
    configuration = configurations.get(name, _Configuration({}, name))
    if configuration.splits:
        return _of_splits(path, repository, configuration.splits)
    patterns = tuple(f"{configuration.folder}/{pattern}" for pattern in _FILES) if configuration.folder else _FILES
    snapshot = hub.snapshot("dataset", repository, patterns)
    folder = snapshot / configuration.folder
    if not folder.is_dir() or not folder.resolve().is_relative_to(snapshot.resolve()):
        raise HvdlmError(
            f"{path}: the data set has neither a configuration nor a folder {name}; "
            + (nearest(name, configurations) if configurations else f"{_ADVICE}.")
        )
    return _Files(folder, None)


def _of_splits(path: str, repository: hub.Repository, by_split: Mapping[str, list[str]]) -> _Files:
    """Return the files of every split, by their patterns."""
    patterns = tuple(pattern for patterns in by_split.values() for pattern in patterns)
    folder = hub.snapshot("dataset", repository, patterns)
    files = {split: _matching(folder, patterns) for split, patterns in by_split.items()}
    missing = [split for split, matches in files.items() if not matches]
    if missing:
        raise HvdlmError(f"{path}: its README.md names files of split {missing[0]} that the data set doesn't have.")
    return _Files(folder, files)


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the files that match, none of them outside of the folder."""
    names = [Path(name) for pattern in patterns for name in glob.glob(pattern, root_dir=folder, recursive=True)]
    inside = {folder / name for name in names if not name.is_absolute() and ".." not in name.parts}
    return sorted(str(file) for file in inside if file.is_file())


@dataclass(frozen=True)
class _Configuration:
    """A configuration: patterns of its ``splits`` or, without any, the ``folder`` whose files are divided by name."""

    splits: Mapping[str, list[str]]
    folder: str = ""
    default: bool = False


def _configurations(path: str, folder: Path) -> dict[str, _Configuration]:
    """Return the configurations that a data set's README.md lists, by their names.

    Raises:
        HvdlmError: the list is damaged.
    """
    readme = folder / _README
    if not readme.is_file():
        return {}
    try:
        text = untrusted_input.read(readme, _README_BYTES, hub.root_of(folder)).decode()
        before, _, header = text.partition("---\n")
        content = {} if before.strip() else safe_yaml.load(header.partition("\n---")[0], safe_load)
        entries = (content.get("configs") if isinstance(content, dict) else None) or []
        return {_name(entry["config_name"]): _configuration(entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HvdlmError(
            f"{path}: the configurations in its README.md can't be read ({shown(repr(error))}): download its files and "
            "name them in --data.path."
        ) from error


def _configuration(entry: Mapping[str, Any]) -> _Configuration:
    files, default = entry.get("data_files"), entry.get("default") is True
    if files is None:
        return _Configuration({}, _text(entry.get("data_dir", "")).strip("/"), default)
    return _Configuration(_patterns(files), default=default)


def _patterns(files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split: text or a list of the split train, or splits with their paths."""
    if isinstance(files, dict):
        return {_text(split): _texts(path) for split, path in files.items()}
    if isinstance(files, list) and files and isinstance(files[0], dict):
        return {_text(entry["split"]): _texts(entry["path"]) for entry in files}
    return {splits.TRAIN: _texts(files)}


def _name(value: Any) -> str:
    return str(value) if type(value) in (int, float) else _text(value)  # the year of a dump


def _texts(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(repr(value))} is no text")
    return value
