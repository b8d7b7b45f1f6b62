"""Data sets of the Hugging Face Hub by name: ``hf:NAME``, ``hf:OWNER/NAME@REVISION`` or ``hf:OWNER/NAME/CONFIG``.

A data set's README.md begins with YAML that describes its configurations: their names, and the files of each split
(https://huggingface.co/docs/hub/datasets-manual-configuration).
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
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
            if config.split not in named.splits:
                raise HvdlmError(
                    f"data.path {path}: it has no split {config.split!r} (--data.split); "
                    f"{nearest(config.split, named.splits)}"
                )
            names = splits.validation_split(named.splits, {config.split}) if config.validation_path is None else []
            paths += named.splits[config.split]
            held_out += [file for name in names for file in named.splits[name]]
            note(f"data.path {path}: training split {config.split}" + "".join(f", validation split {n}" for n in names))
    for path in config.validation_paths:
        named = _files(path, "data.validation_path")
        if named is None or named.splits is None:
            held_out.append(path if named is None else str(named.folder))
        else:
            names = splits.validation_split(named.splits, set()) or list(named.splits)
            held_out += [file for name in names for file in named.splits[name]]
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


def _chosen(path: str, repository: hub.Repository, configuration: str) -> _Files:
    """Return the files of a configuration, or of a folder of the data set; "": of its only or default configuration."""
    configurations = _configurations(path, hub.snapshot("dataset", repository, (_README,)))
    name = configuration or ("default" if "default" in configurations else "")
    if not name and len(configurations) == 1:
        name = next(iter(configurations))
    if not name and configurations:
        example = f"{path}/{next(iter(configurations))}"
        raise HvdlmError(
            f"{path} has the configurations {shown(', '.join(configurations), 200)}: name one, for example {example}."
        )
    if name not in configurations:
        patterns = tuple(f"{name}/{pattern}" for pattern in _FILES) if name else _FILES
        folder = hub.snapshot("dataset", repository, patterns) / name
        if not folder.is_dir():
            raise HvdlmError(
                f"{path}: the data set has neither a configuration nor a folder {name}; "
                + (nearest(name, configurations) if configurations else f"{_ADVICE}.")
            )
        return _Files(folder, None)
    by_split = configurations[name]
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


def _configurations(path: str, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the configurations that a data set's README.md lists: name, split, patterns of the split's files.

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
        entries = content.get("configs", []) if isinstance(content, dict) else []
        return {_text(entry["config_name"]): _patterns(entry.get("data_files", [])) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HvdlmError(
            f"{path}: the configurations in its README.md can't be read ({shown(repr(error))}): download its files and "
            "name them in --data.path."
        ) from error


def _patterns(files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split: text or a list of the split train, or splits with their paths."""
    if isinstance(files, dict):
        return {_text(split): _texts(path) for split, path in files.items()}
    if isinstance(files, list) and files and isinstance(files[0], dict):
        return {_text(entry["split"]): _texts(entry["path"]) for entry in files}
    return {splits.TRAIN: _texts(files)}


def _texts(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list) else [value])]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(repr(value))} is no text")
    return value
