"""Sentences and their translations, line by line, as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvdlm.data.tokenizers import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input

_LIMIT = 1 << 32  # bytes of a text: it is kept in memory


class Texts(NamedTuple):
    """Two texts of as many lines."""

    source: list[str]
    target: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        return hashlib.sha256("\0".join("\n".join(lines) for lines in self).encode()).hexdigest()


class Sentences:
    """Ids of sentences, end to end."""

    def __init__(self, tokenizer: Tokenizer, lines: Iterable[str], longest: int) -> None:
        ids = [tokenizer.encode(line) if line else np.zeros(0, np.int32) for line in lines]
        self.cut = sum(len(sentence) > longest for sentence in ids)
        ids = [sentence[:longest] for sentence in ids]
        self._ends = np.cumsum([0, *(len(sentence) for sentence in ids)])
        self._ids = np.concatenate([np.zeros(0, np.int32), *ids])
        self.lengths = np.diff(self._ends)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the ids of sentence ``number``, int32 ``[time]``."""
        return self._ids[self._ends[number] : self._ends[number + 1]]


def read_texts(paths: Sequence[str], key: str) -> Texts:
    """Return the lines of a source's and a target's file (``.gz`` or not).

    Raises:
        HvdlmError: not two files, or not as many lines.
    """
    if len(paths) != 2:
        raise HvdlmError(
            f"{key}: the task translation reads two files, the source and its translation line by line: "
            f"--{key} '[SOURCE, TARGET]', not {len(paths)}."
        )
    texts = Texts(*(_lines(path, key) for path in paths))
    if len(texts.source) != len(texts.target) or not texts.source:
        raise HvdlmError(
            f"{key}: {paths[0]} has {len(texts.source)} lines, {paths[1]} has {len(texts.target)}: a translation has a "
            "line for every line of its source, and one at least."
        )
    return texts


def _lines(path: str, key: str) -> list[str]:
    try:
        content = untrusted_input.read_unpacked(Path(path), _LIMIT)
        return str(content, "utf-8").split("\n")[: -1 if content.endswith(b"\n") else None]
    except (OSError, ValueError) as error:
        raise HvdlmError(f"{key} {path}: {error}: give a readable UTF-8 text, .gz or not.") from error


def padded(rows: Sequence[np.ndarray], time: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``rows`` filled with zeros, int32 ``[rows, time]``, and what counts of them, float32."""
    ids, weights = np.zeros((len(rows), time), np.int32), np.zeros((len(rows), time), np.float32)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        weights[place, : len(row)] = 1
    return ids, weights
