"""Tokenizers of characters and words; training of the tokenizer that ``data.tokenizer`` names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.data.tokenizers import BUILT_IN, LIMIT, SLACK, find_kind, from_json
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora.bpe_tokenizer import BPETokenizer

_TABLE = 1 << 16  # a table of all code points would take 4 MB even for a vocabulary of one character


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
    def load(description: Mapping[str, Any]) -> CharTokenizer:
        """Return the tokenizer of a description."""
        if not isinstance(description["characters"], str):
            raise ValueError("it is of no known kind: 'char'")
        return CharTokenizer(description["characters"])

    @staticmethod
    def train(texts: Iterable[str], size: int | None = None) -> CharTokenizer:
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

    def encode_offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, one for each character."""
        characters = np.arange(len(text))
        return self.encode(text), np.stack([characters, characters + 1], 1)

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
    def load(description: Mapping[str, Any]) -> WordTokenizer:
        """Return the tokenizer of a description."""
        words = description["words"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("it is of no known kind: 'word'")
        return WordTokenizer(words)

    @staticmethod
    def train(texts: Iterable[str], size: int | None = None) -> WordTokenizer:
        """Return the tokenizer of the ``size`` (None: 10,000) most frequent words, ties in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_words(text))
        fixed = ["<eos>", "<unk>"]
        ranked = sorted((w for w in counts if w not in fixed), key=lambda w: (-counts[w], w))
        return WordTokenizer(fixed + ranked[: (size or 10000) - len(fixed)])

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


def train(name: str, size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer ``name`` (see ``DataConfig.tokenizer``), trained on ``texts`` where it needs training.

    A file may be Hugging Face's tokenizer.json or that of a run (``to_json``).

    Raises:
        HvdlmError: it is neither a known kind nor a readable tokenizer.json.
    """
    if (kind := find_kind(name)) is not None:
        return kind.train(texts, size)
    check(name)
    try:
        value = untrusted_input.read_json(Path(name), LIMIT, slack=SLACK)
        return from_json(value) if isinstance(value, dict) and "kind" in value else BPETokenizer(json.dumps(value))
    except (ValueError, OSError) as error:
        raise HvdlmError(
            f"data.tokenizer {name}: can't be read: {error}: give a Hugging Face tokenizer.json."
        ) from error


def check(name: str) -> None:
    """Check that ``data.tokenizer`` names a known kind or an existing file."""
    if find_kind(name) is None and not Path(name).is_file():
        advice = nearest(name, set(BUILT_IN).union(*plugins.collections("tokenizers").values()))
        raise HvdlmError(f"data.tokenizer: {shown(repr(name))} is no kind and no file of a tokenizer; {advice}")
