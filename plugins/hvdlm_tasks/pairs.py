"""Parallel text: sentences and their translations, line by line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding
from hvdlm_corpora import compression

_MAX_BYTES = 1 << 32  # of a text, which is kept in memory


class Texts(NamedTuple):
    """Source and target lines, equally many."""

    source: list[str]
    target: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of both texts."""
        return hashlib.sha256("\0".join("\n".join(lines) for lines in self).encode()).hexdigest()


class Sentences:
    """Token ids of sentences, in one array; ``lengths``: int64 ``[sentences]``."""

    def __init__(self, tokenizer: Tokenizer, lines: Iterable[str], max_length: int) -> None:
        texts = list(lines)
        none = np.zeros(0, np.int32)
        ids = tokenizer.within_budget(
            sum(map(len, texts)),
            lambda: [tokenizer.encode(line)[:max_length] if line else none for line in texts],
        )
        self._ends = np.cumsum([0, *(len(sentence) for sentence in ids)])
        self._ids = np.concatenate([np.zeros(0, np.int32), *ids])
        self.lengths = np.diff(self._ends)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the ids of sentence ``number``, int32 ``[time]``."""
        return self._ids[self._ends[number] : self._ends[number + 1]]


def read_texts(paths: Sequence[str], key: str) -> Texts:
    """Read a source and a target file, each plain or packed (``.gz``, ``.bz2``, ``.xz``, ``.zst``).

    Raises:
        HvdlmError: a file can't be read, or the numbers of lines differ.
    """
    if len(paths) != 2:
        raise HvdlmError(
            f"{key}: the task translation reads two files, the source and its translation, not {len(paths)}: "
            f"--{key} '[SOURCE, TARGET]'."
        )
    texts = Texts(*(_lines(path, key) for path in paths))
    if len(texts.source) != len(texts.target) or not texts.source:
        raise HvdlmError(
            f"{key}: {paths[0]} has {len(texts.source)} lines, {paths[1]} has {len(texts.target)}: they need "
            "equally many, at least one."
        )
    return texts


def _lines(path: str, key: str) -> list[str]:
    try:
        content = text_decoding.decode(compression.read_unpacked(Path(path), _MAX_BYTES))
        return content.split("\n")[: -1 if content.endswith("\n") else None]
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{key} {path}: {error}: give a readable UTF-8 text, plain or packed (.gz).") from error
