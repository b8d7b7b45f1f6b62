"""Token folders: memory-mapped ids with a JSON header, written once by one process and shared by all."""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hvdlm import untrusted
from hvdlm.config import DataConfig
from hvdlm.data import sources, tokenizers
from hvdlm.data.documents import Form
from hvdlm.disk import write_synced
from hvdlm.interfaces import HvdlmError
from hvdlm.untrusted import shown

FORMAT = "hvdlm-tokens-2"
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_LIMIT = 1 << 26  # a header beyond this is none of ours
_KEYS = {"format", "dtype", "train", "validation", "validation_bytes", "tokenizer", "sources"}
_COUNT = 1 << 53
_ALL = 1 << 24  # ids that are all looked at when a folder is opened: some milliseconds


@dataclass(frozen=True)
class TokenData:
    """An open token folder: ids of the training and validation split, memory-mapped, ``[n]`` uint16 or uint32.

    ``fingerprint``: of the texts, the tokenizer and the split; not of the paths, which nodes may call differently.
    """

    folder: Path
    tokenizer: tokenizers.Tokenizer
    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    fingerprint: str


def prepare(config: DataConfig, output: str | None = None) -> TokenData:
    """Return the tokens of ``config``, from the cache where they are, else tokenized and written there.

    Raises:
        HvdlmError: a source can't be used, or the folder can't be written.
    """
    paths = config.paths
    if len(paths) == 1 and (Path(paths[0]) / "header.json").is_file():
        return open_tokens(Path(paths[0]))
    config = without_stdin(config)
    check_sources(config)
    folder = Path(output) if output else _cache(config) / _key(config)
    if output and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HvdlmError(f"--output {folder}: it exists and is no empty folder: name one that doesn't exist yet.")
    try:
        with _lock(folder):
            if not (folder / "header.json").is_file():
                _write(config, folder)
    except OSError as error:
        raise HvdlmError(
            f"the token files can't be written to {folder}: {error.strerror or error}"
            ": free space or choose another folder (--data.cache FOLDER)."
        ) from error
    return open_tokens(folder)


def without_stdin(config: DataConfig) -> DataConfig:
    """Return ``config`` with standard input kept in a file: it is read twice, and found again when a run resumes."""
    paths, held_out = config.paths, config.validation_paths
    if "-" not in (*paths, *held_out):
        return config
    kept = sources.spool(_cache(config))
    paths, held_out = ([kept if path == "-" else path for path in group] for group in (paths, held_out))
    return replace(config, path=paths, validation_path=held_out or None)


def check_sources(config: DataConfig) -> None:
    """Check quickly that every source and the tokenizer are there and readable.

    Raises:
        HvdlmError: one isn't.
    """
    if len(config.paths) == 1 and (Path(config.paths[0]) / "header.json").is_file():
        return
    tokenizers.check(config.tokenizer)
    for path in sources.expand([*config.paths, *(config.validation_paths)]):
        if path != "embedded" and os.path.getsize(path) == 0:
            raise HvdlmError(f"data.path {path}: the file is empty: give a file with text.")


def _cache(config: DataConfig) -> Path:
    if config.cache:
        return Path(config.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdlm" / "tokens"


def _key(config: DataConfig) -> str:
    settings: list[Any] = [FORMAT, config.tokenizer, config.vocab_size, config.validation_share]
    settings += [config.field, config.separator]
    for group in (config.paths, config.validation_paths):
        for source in sources.expand(group):
            settings.append(_identity(source))
        settings.append("|")
    if os.path.isfile(config.tokenizer):
        settings.append(_identity(config.tokenizer))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def _identity(source: str) -> list[Any]:
    if source == "embedded":
        return [source, hashlib.sha256(sources.embedded().encode()).hexdigest()]
    status = os.stat(source)
    return [os.path.abspath(source), status.st_size, status.st_mtime_ns]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(config: DataConfig, folder: Path) -> None:
    """Read the sources twice, once for the tokenizer and once to encode, piece by piece."""
    paths, held_out, form = config.paths, config.validation_paths, Form(config.field, config.separator)
    digests: dict[str, str] = {}
    every = [*paths, *held_out]
    tokenizer = tokenizers.train(config.tokenizer, config.vocab_size, sources.texts(every, digests, form))
    if not digests:  # a tokenizer that needs no training has not looked at the text
        for _ in sources.texts(every, digests, form):
            pass
    name = "uint16" if tokenizer.vocab <= 1 << 16 else "uint32"
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        with (temporary / "tokens.bin").open("wb") as file:
            places = _encode(tokenizer, paths, form, file, _DTYPES[name])
            train, validation = places[-1].tokens, 0
            if held_out:
                held = _encode(tokenizer, held_out, form, file, _DTYPES[name])
                validation, size = held[-1].tokens, held[-1].bytes
            else:
                train = int(train * (1 - config.validation_share))
                validation, size = places[-1].tokens - train, 0
            file.flush()
            os.fsync(file.fileno())
        if not held_out:
            size = places[-1].bytes - _bytes_before(temporary / "tokens.bin", _DTYPES[name], tokenizer, places, train)
        header = {
            "format": FORMAT,
            "dtype": name,
            "train": train,
            "validation": validation,
            # Words decode to one blank between them and <unk>: bits per byte of the text are not defined.
            "validation_bytes": 0 if config.tokenizer == "word" else size,
            "tokenizer": tokenizer.hash,
            "sources": digests,
        }
        write_synced(temporary / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        write_synced(temporary / "header.json", json.dumps(header, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Place(NamedTuple):
    """How many tokens, made of how many bytes of text, have been written after a piece."""

    tokens: int
    bytes: int


def _encode(
    tokenizer: tokenizers.Tokenizer, paths: list[str], form: Form, file: BinaryIO, dtype: np.dtype
) -> list[_Place]:
    """Append the tokens of ``paths`` to ``file``; return the place after every piece."""
    places = [_Place(0, 0)]
    for text in sources.texts(paths, form=form):
        ids = tokenizer.encode(text)
        file.write(ids.astype(dtype).tobytes())
        places.append(_Place(places[-1].tokens + len(ids), places[-1].bytes + len(text.encode())))
    return places


def _bytes_before(
    path: Path, dtype: np.dtype, tokenizer: tokenizers.Tokenizer, places: list[_Place], count: int
) -> int:
    """Return of how many bytes of text the first ``count`` tokens are made."""
    index = bisect.bisect_right([place.tokens for place in places], count) - 1
    ids = np.fromfile(path, dtype, count - places[index].tokens, offset=places[index].tokens * dtype.itemsize)
    return places[index].bytes + len(tokenizer.decode(ids.tolist()).encode())


def open_tokens(folder: Path) -> TokenData:
    """Return the token folder, checked.

    Raises:
        HvdlmError: it is damaged or foreign.
    """
    try:
        header = _header(folder)
        dtype, counts = _DTYPES[header["dtype"]], [header["train"], header["validation"]]
        size = untrusted.size(folder / "tokens.bin", within=folder)
        if size != sum(counts) * dtype.itemsize:
            raise ValueError(f"tokens.bin has {size} bytes, the header says {sum(counts)} tokens of {dtype.itemsize}")
        path = folder / "tokenizer.json"
        tokenizer = tokenizers.from_json(untrusted.read_json(path, tokenizers.LIMIT, folder, tokenizers.SLACK))
        if tokenizer.hash != header["tokenizer"]:
            raise ValueError("the tokenizer isn't the one that the tokens were made with")
        tokens: np.ndarray = np.memmap(folder / "tokens.bin", dtype, "r") if size else np.zeros(0, dtype)
        if (highest := _highest(tokens)) >= tokenizer.vocab:
            raise ValueError(f"tokens.bin holds the id {highest}, the vocabulary has {tokenizer.vocab} entries")
        train, validation = tokens[: counts[0]], tokens[counts[0] :]
        return TokenData(folder, tokenizer, train, validation, header["validation_bytes"], _fingerprint(header))
    except (ValueError, OSError, RecursionError, HvdlmError) as error:
        why = shown(str(error).rstrip("."), 250)
        raise HvdlmError(
            f"token folder {folder} is damaged or foreign: {why}: delete it and prepare it anew."
        ) from error


def _header(folder: Path) -> dict[str, Any]:
    """Return the header; what is used of it is of the types that ``_write`` gives it."""
    header = untrusted.read_json(folder / "header.json", _LIMIT, folder)
    if not isinstance(header, dict):
        raise ValueError("header.json holds no mapping")
    if missing := _KEYS - header.keys():
        raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
    digests = header["sources"]
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"its sources are {shown(repr(digests))}")
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {shown(repr(header['format']))}, not {FORMAT!r}")
    if not isinstance(header["dtype"], str) or header["dtype"] not in _DTYPES:
        raise ValueError(f"{shown(repr(header['dtype']))} is no dtype of tokens")
    for name in ("train", "validation", "validation_bytes"):
        if type(header[name]) is not int or not 0 <= header[name] < _COUNT:
            raise ValueError(f"its {name} is {shown(repr(header[name]))}")
    return header


def _fingerprint(header: dict[str, Any]) -> str:
    said = [header[name] for name in ("format", "dtype", "train", "validation", "tokenizer")]
    return hashlib.sha256(json.dumps([said, sorted(header["sources"].values())]).encode()).hexdigest()


def _highest(tokens: np.ndarray) -> int:
    """Return the highest of the ids, in a large file of those in 64 blocks of it: opening must not take long."""
    if len(tokens) <= _ALL:
        return int(tokens.max(initial=0)) if len(tokens) else -1
    block = 1 << 16
    starts = np.linspace(0, len(tokens) - block, 64, dtype=np.int64)
    return max(int(tokens[start : start + block].max()) for start in starts)


def require_length(tokens: np.ndarray, context: int, split: str) -> None:
    """Check that a split holds one window at least."""
    if len(tokens) < context + 1:
        raise HvdlmError(
            f"the {split} split has {len(tokens)} tokens, fewer than data.context + 1 = {context + 1}: "
            "give more text or a smaller --data.context."
        )
