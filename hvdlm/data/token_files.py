"""Token folders: memory-mapped token ids with a JSON header and a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.data import tokenizers
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

FORMAT = "hvdlm-tokens-2"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_LIMIT = 1 << 26  # bytes; hvdlm writes no larger header
_KEYS = {"format", "dtype", "train", "validation", "validation_bytes", "tokenizer", "sources"}
_COUNT = 1 << 53  # JSON readers keep integers exact up to here
_CHECKED = 1 << 24  # ids; checking so many when a folder is opened takes some milliseconds


@dataclass(frozen=True)
class TokenData:
    """An open token folder.

    Attributes:
        folder: its path.
        tokenizer: the tokenizer of its ids.
        train: memory-mapped ids of the training split, ``[n]`` uint16 or uint32.
        validation: those of the validation split.
        validation_bytes: bytes of the validation text; 0 where the tokenizer doesn't preserve the text.
        fingerprint: hash of the texts, the tokenizer and the split; not of the paths, which may differ between nodes.
    """

    folder: Path
    tokenizer: tokenizers.Tokenizer
    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    fingerprint: str


def is_prepared(paths: Sequence[str]) -> bool:
    """Return whether ``paths`` name a token folder."""
    return len(paths) == 1 and (Path(paths[0]) / "header.json").is_file()


def open_tokens(folder: Path) -> TokenData:
    """Open a token folder and check it.

    Raises:
        HvdlmError: it is damaged or foreign.
    """
    try:
        header = _header(folder)
        dtype, counts = DTYPES[header["dtype"]], [header["train"], header["validation"]]
        size = untrusted_input.size(folder / "tokens.bin", within=folder)
        if size != sum(counts) * dtype.itemsize:
            raise ValueError(f"tokens.bin has {size} bytes, the header says {sum(counts)} tokens of {dtype.itemsize}")
        path = folder / "tokenizer.json"
        tokenizer = tokenizers.read(path, folder)
        if tokenizer.hash != header["tokenizer"]:
            raise ValueError("its tokenizer isn't the one that encoded its tokens")
        tokens: np.ndarray = np.memmap(folder / "tokens.bin", dtype, "r") if size else np.zeros(0, dtype)
        if (most := highest(tokens)) >= tokenizer.vocab:
            raise ValueError(f"tokens.bin holds the id {most}, the vocabulary has {tokenizer.vocab} entries")
        train, validation = tokens[: counts[0]], tokens[counts[0] :]
        return TokenData(folder, tokenizer, train, validation, header["validation_bytes"], _fingerprint(header))
    except (ValueError, OSError, RecursionError, HvdlmError) as error:
        reason = shown(str(error).rstrip("."), 250)
        raise HvdlmError(
            f"token folder {folder} is damaged or foreign: {reason}: delete it and prepare it again."
        ) from error


def _header(folder: Path) -> dict[str, Any]:
    """Return the header, which is untrusted, after checking the types of all entries that are used."""
    header = untrusted_input.read_json(folder / "header.json", _LIMIT, folder)
    if not isinstance(header, dict):
        raise ValueError("header.json is not a mapping")
    if missing := _KEYS - header.keys():
        raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
    digests = header["sources"]
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"its sources are {shown(repr(digests))}")
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {shown(repr(header['format']))}, not {FORMAT!r}")
    if not isinstance(header["dtype"], str) or header["dtype"] not in DTYPES:
        raise ValueError(f"{shown(repr(header['dtype']))} is not a dtype of tokens")
    for name in ("train", "validation", "validation_bytes"):
        if type(header[name]) is not int or not 0 <= header[name] < _COUNT:
            raise ValueError(f"its {name} is {shown(repr(header[name]))}")
    return header


def _fingerprint(header: dict[str, Any]) -> str:
    settings = [header[name] for name in ("format", "dtype", "train", "validation", "tokenizer")]
    return hashlib.sha256(json.dumps([settings, sorted(header["sources"].values())]).encode()).hexdigest()


def highest(tokens: np.ndarray) -> int:
    """Return the highest id; in a large file only 64 blocks are checked, since opening must be fast."""
    if len(tokens) <= _CHECKED:
        return int(tokens.max(initial=0)) if len(tokens) else -1
    block = 1 << 16
    starts = np.linspace(0, len(tokens) - block, 64, dtype=np.int64)
    return max(int(tokens[start : start + block].max()) for start in starts)


def require_length(tokens: np.ndarray, context: int, split: str) -> None:
    """Check that a split holds at least one window."""
    if len(tokens) < context + 1:
        raise HvdlmError(
            f"{split} split has {len(tokens)} tokens, fewer than data.context + 1 = {context + 1}: "
            "give more text or a smaller --data.context."
        )
