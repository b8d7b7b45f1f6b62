"""Tokenizers: byte, character, word, and BPE through Hugging Face ``tokenizers``; stored as JSON, never pickled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.data.bpe_tokenizer import SLACK, BPETokenizer
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

LIMIT = 1 << 26  # bytes of a tokenizer's file
_TABLE = 1 << 16  # a table of all code points would take 4 MB even for a vocabulary of one character


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: 256 ids for any text."""

    vocab = 256

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return the bytes as int32 ``[n]``."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; invalid UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def byte_count(self, ids: Sequence[int]) -> int:
        """Return the number of ids, also where a character is cut off."""
        return len(ids)

    def to_json(self) -> dict[str, Any]:
        """Return the kind alone."""
        return {"kind": "byte"}


class CharTokenizer(Tokenizer):
    """The distinct characters of a corpus, sorted."""

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self.vocab = len(characters)
        points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._order = np.argsort(points).astype(np.int32)
        self._points = points[self._order]
        if not self.vocab or (self._points[1:] == self._points[:-1]).any():
            raise ValueError("a vocabulary needs at least one character, each once")
        low = points[points < _TABLE]
        self._table = np.full(int(low.max(initial=0)) + 1, -1, np.int32)
        self._table[low] = np.flatnonzero(points < _TABLE)

    @staticmethod
    def train(texts: Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of all characters in ``texts``."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return one int32 id per character; raise HvdlmError for one that the vocabulary lacks."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        high = points >= len(self._table)
        if high.any():
            ids[high] = self._search(points[high])
        if (ids < 0).any():
            character = text[int((ids < 0).argmax())]
            raise HvdlmError(
                f"character {character!r} is not among the {self.vocab} that the model knows: leave it out, or train "
                "with --data.tokenizer byte, which encodes any text."
            )
        return ids

    def _search(self, points: np.ndarray) -> np.ndarray:
        """Return the ids of code points, -1 for those outside of the vocabulary."""
        indices = np.minimum(np.searchsorted(self._points, points), self.vocab - 1)
        return np.where(self._points[indices] == points, self._order[indices], np.int32(-1))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return "".join(self._characters[i] for i in ids)

    def to_json(self) -> dict[str, Any]:
        """Return kind and characters."""
        return {"kind": "char", "characters": self._characters}


class WordTokenizer(Tokenizer):
    """Words between white space, an ``<eos>`` at each end of line, ``<unk>`` for the rest (Mikolov's Penn Treebank)."""

    special: tuple[str, ...] = ("<eos>",)

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(words)}
        self.vocab = len(words)
        if len(self._ids) != self.vocab or "<unk>" not in self._ids:
            raise ValueError("a vocabulary needs every word once, and <unk>")
        self._unknown = self._ids["<unk>"]

    @staticmethod
    def train(texts: Iterable[str], size: int) -> WordTokenizer:
        """Return the tokenizer of the ``size`` most frequent words, ties in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_words(text))
        fixed = ["<eos>", "<unk>"]
        ranked = sorted((w for w in counts if w not in fixed), key=lambda w: (-counts[w], w))
        return WordTokenizer(fixed + ranked[: size - len(fixed)])

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return one int32 id per word and per end of line; ``<eos>`` in a text is an unknown word."""
        return np.fromiter((self._ids.get(w, self._unknown) for w in _words(text, special)), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words with blanks between them, a new line for each ``<eos>``."""
        return " ".join(self._words[i] for i in ids).replace(" <eos> ", "\n").replace(" <eos>", "\n")

    def to_json(self) -> dict[str, Any]:
        """Return kind and words."""
        return {"kind": "word", "words": self._words}


def _words(text: str, special: bool = False) -> Iterable[str]:
    for line in text.splitlines(keepends=True):
        words = line.split()
        yield from words if special or "<eos>" not in words else ("<unk>" if w == "<eos>" else w for w in words)
        if line.endswith("\n"):
            yield "<eos>"


def from_json(value: Any) -> Tokenizer:
    """Return the tokenizer that ``to_json`` described, from an untrusted value.

    Raises:
        HvdlmError: it is not the description of a tokenizer.
    """
    try:
        kind = value["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char" and isinstance(value["characters"], str):
            return CharTokenizer(value["characters"])
        if (
            kind == "word"
            and isinstance(value["words"], list)
            and all(isinstance(word, str) for word in value["words"])
        ):
            return WordTokenizer(value["words"])
        if kind == "bpe":
            return BPETokenizer(json.dumps(value["description"]))
        if isinstance(kind, str) and (own := plugins.tokenizer_kind(kind)):
            return own.from_json(value)
        raise ValueError(f"it is of no known kind: {shown(repr(kind))}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise HvdlmError(
            f"the tokenizer description is damaged or foreign ({shown(str(error), 200)}): prepare the data again."
        ) from error


def read(path: Path, within: Path | None = None) -> Tokenizer:
    """Return the tokenizer that a file describes (``to_json``); ``within``: a folder that must contain the file.

    Raises:
        HvdlmError: it is not the description of a tokenizer.
        ValueError, OSError: the file can't be read.
    """
    return from_json(untrusted_input.read_json(path, LIMIT, within, SLACK))


def train(name: str, size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer ``name`` (see ``DataConfig.tokenizer``), trained on ``texts`` where it needs training.

    A file may be Hugging Face's tokenizer.json or that of a run (``to_json``).

    Raises:
        HvdlmError: it is neither a known kind nor a readable tokenizer.json.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.train(texts)
    if name == "word":
        return WordTokenizer.train(texts, size or 10000)
    if name == "bpe":
        return BPETokenizer.train(texts, size or 4096)
    check(name)
    if own := plugins.tokenizer_kind(name):
        return own.train(texts, size)
    try:
        value = untrusted_input.read_json(Path(name), LIMIT, slack=SLACK)
        return from_json(value) if isinstance(value, dict) and "kind" in value else BPETokenizer(json.dumps(value))
    except (ValueError, OSError) as error:
        raise HvdlmError(
            f"data.tokenizer {name}: can't be read: {error}: give a Hugging Face tokenizer.json."
        ) from error


def check(name: str) -> None:
    """Check that ``data.tokenizer`` names a known kind, an installed plugin's, or an existing file."""
    if name in ("byte", "char", "word", "bpe") or Path(name).is_file() or plugins.tokenizer_kind(name):
        return
    own = ", ".join(plugins.tokenizer_names())
    raise HvdlmError(
        f"data.tokenizer {name!r} is neither byte, char, word or bpe{f', nor {own} of a plugin,' if own else ''} nor "
        "the path of a tokenizer.json: choose one of them."
    )
