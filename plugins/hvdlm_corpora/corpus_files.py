"""Finds the files of a corpus in folders and by patterns, with a sentence on everything that is left out."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import compression, documents

TEXTS = (".txt", ".md", ".text")
SUFFIXES = (*TEXTS, *documents.PACKABLE, *documents.TABLES, *compression.SUFFIXES)
"""Suffixes of the files that are read in a folder."""

_METADATA = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # of Hugging Face data sets
_UNCERTAIN = (".json", ".csv", ".tsv")  # in a folder these may be settings or figures, not texts
_HEAD = 1 << 16  # bytes in which the name of the field is searched
_LIMIT = 1 << 24  # bytes of a JSON file
_SET = re.compile(r"(.+?)[-._]\d+-of-(\d+)\b.*")


class CorpusFiles(NamedTuple):
    """The ``files`` that a path names, sorted, and ``notes``: phrases on what was left out."""

    files: list[str]
    notes: list[str]


def find(path: str, field: str) -> CorpusFiles:
    """Return the files that ``path`` names: "embedded", a file, those in a folder, or those that match a pattern.

    Raises:
        HvdlmError: it names nothing readable, or a folder that holds a data set of several splits.
    """
    if path == "embedded":
        return CorpusFiles([path], [])
    if os.path.isdir(path):
        corpus = _in_folder(Path(path), field)
    elif os.path.exists(path):
        corpus = CorpusFiles([path], [])
    else:
        corpus = _matching(path)
    for source in corpus.files:
        _check(source)
    return corpus


def _check(source: str) -> None:
    if not os.access(source, os.R_OK):
        raise _unreadable(source)
    if not os.path.isfile(source):
        raise HvdlmError(
            f"data.path {source}: not a regular file, and texts are read twice: save it as a file, or pipe it into "
            "--data.path -."
        )


def _matching(pattern: str) -> CorpusFiles:
    matches = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in matches if os.path.isfile(path)]
    if not files:
        raise HvdlmError(f"data.path {pattern}: there is no such file, folder or match: check --data.path.")
    folders = sum(map(os.path.isdir, matches)) if "**" not in pattern else 0
    return CorpusFiles(files, [f"{_count(folders, 'folder')} that the pattern matches"] if folders else [])


def _in_folder(folder: Path, field: str) -> CorpusFiles:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise _unreadable(str(folder))
    _check_one_data_set(folder)
    unrelated = unrelated_files(folder)
    files: list[str] = []
    reasons: Counter[str] = Counter()
    names: defaultdict[str, list[str]] = defaultdict(list)
    for parent, folders, leaves in os.walk(folder, onerror=_raise):
        for name in list(folders):
            linked = os.path.islink(os.path.join(parent, name))
            if _is_hidden(name) or linked:
                folders.remove(name)
                reasons["hidden"] += not linked
                names["linked folders"] += [name] if linked else []
        for name in leaves:
            path = os.path.join(parent, name)
            if _is_hidden(name):
                reasons["hidden"] += 1
            elif Path(path) in unrelated:
                reasons["not listed in the data set's state.json"] += 1
            elif not os.path.isfile(path) or not is_known(name):
                names["other types"].append(os.path.splitext(name)[1] or name)
            elif name in _METADATA:
                pass
            elif name == "README.md" and Path(parent) == folder and folder.parent.name == "snapshots":
                names["description of a data set"].append(name)  # in the cache of huggingface_hub
            elif name.lower().removesuffix(compression.suffix(name)).endswith(_UNCERTAIN) and not _has(path, field):
                names[f"no field {field!r}"].append(name)
            else:
                files.append(path)
    notes = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
    notes += [f"{len(items):,} {reason} ({_listed(items)})" for reason, items in names.items() if items]
    if not files:
        left_out = f" (left out: {'; '.join(notes)})" if notes else ""
        raise HvdlmError(f"data.path {folder}: the folder holds no {', '.join(SUFFIXES)} file{left_out}.")
    return CorpusFiles(sorted(files), notes)


def is_known(name: str) -> bool:
    """Return whether a file of this name is read in a folder."""
    lower = name.lower()
    return lower.endswith(SUFFIXES) and not lower.removesuffix(compression.suffix(lower)).endswith(".tar")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unreadable(path: str) -> HvdlmError:
    return HvdlmError(f"data.path {path}: this user can't read it: change its permissions or path.")


def _raise(error: OSError) -> None:
    raise _unreadable(error.filename)


def _has(path: str, field: str) -> bool:
    """Return whether the name of the field is near the start of a file; True for one that can't be read."""
    try:
        with open(path, "rb") as file:
            head = next(text_decoding.as_utf8(compression.unpack(file, path, _HEAD)), b"")
    except (OSError, ValueError):
        return True  # reading it will say what is wrong
    name = field.encode(errors="replace")
    if documents.kind(path) == ".json":
        outermost = json.dumps(field.partition(".")[0]).encode()
        return any(quoted in head for quoted in (b'"%s"' % name, json.dumps(field).encode(), outermost))
    return name in re.split(rb'[,\t"]+', head.partition(b"\n")[0])


def incomplete_sets(files: Iterable[str]) -> list[str]:
    """Return a sentence on each set of files named "i of N" that has fewer than N of them."""
    sets: Counter[tuple[str, str, int]] = Counter()
    for path in files:
        if match := _SET.fullmatch(os.path.basename(path)):
            sets[os.path.dirname(path), match[1], int(match[2][:18])] += 1
    return [
        f"data.path {os.path.join(folder, name)}: {count:,} of a set of {total:,} files"
        for (folder, name, total), count in sets.items()
        if count < total
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _listed(names: Iterable[str]) -> str:
    """Return the names, each once, as many as fit in a sentence."""
    return shown(", ".join(sorted(set(names))))


def unrelated_files(folder: Path) -> set[Path]:
    """Return the Arrow files in a data set's folder that it doesn't list: caches, or left from an earlier save."""
    unrelated: set[Path] = set()
    for state in folder.rglob("state.json"):
        files = set(state.parent.glob("*.arrow"))
        if files and (names := listed_names(state, "_data_files", "filename")):
            unrelated |= files - {state.parent / name for name in names}
    return unrelated


def _check_one_data_set(folder: Path) -> None:
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


def listed_names(path: Path, key: str, name: str | None = None) -> list[str]:
    """Return the file names that a JSON file of the library lists under ``key``; ``name``: their key in its entries.

    Raises:
        HvdlmError: it is damaged, or names files of other folders.
    """
    try:
        entries = untrusted_input.read_json(path, _LIMIT).get(key, [])
        names = [entry if name is None else entry[name] for entry in entries]
        if not all(isinstance(n, str) and Path(n).name == n and n not in ("", "..") for n in names):
            raise ValueError(f"its {key} are {shown(repr(entries))}")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HvdlmError(
            f"data.path {path}: is damaged or not of a Hugging Face data set ({shown(repr(error))}): save it again."
        ) from error
