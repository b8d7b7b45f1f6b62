"""Tokenizers: byte, character, word, and BPE through Hugging Face ``tokenizers``. Kept as JSON, never pickled."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdlm.data.tokenizer_expansion import growth
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

LIMIT = 1 << 26  # bytes: a tokenizer's file beyond this is none of ours
SLACK = 1 << 24  # a vocabulary is many small parts: bytes that reading one may take beside 10 times its file's size
_TABLE = 1 << 16  # a table of all code points would take 4 MB for a vocabulary of one character
_GROWTH = 256  # text that grows more while it is prepared for encoding is a bomb


class Tokenizer(Protocol):
    """Turns text into int32 ids below ``vocab`` and back."""

    vocab: int

    def encode(self, text: str) -> np.ndarray:
        """Return int32 ids ``[n]``; raise HvdlmError where the text can't be written with this vocabulary."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values that ``from_json`` takes."""

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: equal tokenizers have equal hashes."""


class _Hashed:
    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


class ByteTokenizer(_Hashed):
    """UTF-8 bytes: 256 ids, any text."""

    vocab = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes as int32 ``[n]``."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "byte"}


class CharTokenizer(_Hashed):
    """The distinct characters of a corpus, sorted."""

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self.vocab = len(characters)
        points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._order = np.argsort(points).astype(np.int32)
        self._points = points[self._order]
        if not self.vocab or (self._points[1:] == self._points[:-1]).any():
            raise ValueError("a vocabulary holds every character once, and one at least")
        low = points[points < _TABLE]
        self._table = np.full(int(low.max(initial=0)) + 1, -1, np.int32)
        self._table[low] = np.flatnonzero(points < _TABLE)

    @staticmethod
    def train(texts: Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of all characters in ``texts``."""
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return CharTokenizer("".join(sorted(found)))

    def encode(self, text: str) -> np.ndarray:
        """Return one int32 id per character; raise HvdlmError for one that the corpus doesn't have."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        high = points >= len(self._table)
        if high.any():
            ids[high] = self._searched(points[high])
        if (ids < 0).any():
            character = text[int((ids < 0).argmax())]
            raise HvdlmError(
                f"character {character!r} is not among the {self.vocab} that the model knows: leave it out, or train "
                "with --data.tokenizer byte, which knows all."
            )
        return ids

    def _searched(self, points: np.ndarray) -> np.ndarray:
        """Return the ids of code points, -1 where there is none."""
        places = np.minimum(np.searchsorted(self._points, points), self.vocab - 1)
        return np.where(self._points[places] == points, self._order[places], np.int32(-1))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return "".join(self._characters[i] for i in ids)

    def to_json(self) -> dict[str, Any]:
        """Return kind and characters."""
        return {"kind": "char", "characters": self._characters}


class WordTokenizer(_Hashed):
    """Words between white space, an ``<eos>`` at each end of line, ``<unk>`` for the rest (Mikolov's Penn Treebank)."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(words)}
        self.vocab = len(words)
        if len(self._ids) != self.vocab or "<unk>" not in self._ids:
            raise ValueError("a vocabulary holds every word once, and <unk>")
        self._unknown = self._ids["<unk>"]

    @staticmethod
    def train(texts: Iterable[str], size: int) -> WordTokenizer:
        """Return the tokenizer of the ``size`` most frequent words, equal ones in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_words(text))
        fixed = ["<eos>", "<unk>"]
        ranked = sorted((w for w in counts if w not in fixed), key=lambda w: (-counts[w], w))
        return WordTokenizer(fixed + ranked[: size - len(fixed)])

    def encode(self, text: str) -> np.ndarray:
        """Return one int32 id per word and end of line."""
        return np.fromiter((self._ids.get(w, self._unknown) for w in _words(text)), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words with blanks between them, a new line for each ``<eos>``."""
        return " ".join(self._words[i] for i in ids).replace(" <eos> ", "\n").replace(" <eos>", "\n")

    def to_json(self) -> dict[str, Any]:
        """Return kind and words."""
        return {"kind": "word", "words": self._words}


def _words(text: str) -> Iterable[str]:
    for line in text.splitlines(keepends=True):
        yield from line.split()
        if line.endswith("\n"):
            yield "<eos>"


def _vocab(entries: Mapping[str, int]) -> int:
    """Return how many ids a model needs: a vocabulary may have gaps, but not be made of them.

    Raises:
        ValueError: it is.
    """
    highest = max(entries.values(), default=-1)
    if highest >= 2 * len(entries) + 1024:
        raise ValueError(f"it has {len(entries)} entries and the id {highest}")
    return highest + 1


class BPETokenizer(_Hashed):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained or loaded by Hugging Face ``tokenizers``."""

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as Encoder

        try:
            self._description = untrusted_input.parse_json(description, SLACK)
            # Written anew: of a key that stands there twice, the library shall see what is looked at here.
            same = json.dumps(self._description)
            self._encoder = untrusted_input.guarded(lambda: Encoder.from_str(same))
            # What is made for batches of short texts would cut a corpus, or fill it up.
            self._encoder.no_truncation()
            self._encoder.no_padding()
            self.vocab = _vocab(self._encoder.get_vocab())
            if growth(self._description) > _GROWTH:
                raise ValueError(f"it makes text more than {_GROWTH} times longer")
        except (ValueError, RecursionError) as error:
            raise HvdlmError(
                f"the tokenizer file is no Hugging Face tokenizer.json: {shown(str(error), 200)}."
            ) from error

    @staticmethod
    def train(texts: Iterable[str], size: int) -> BPETokenizer:
        """Return a tokenizer of at most ``size`` entries."""
        from tokenizers import Tokenizer as Encoder
        from tokenizers import decoders, models, pre_tokenizers, trainers

        encoder = Encoder(models.BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoder.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        encoder.train_from_iterator(texts, trainer)
        return BPETokenizer(encoder.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Return int32 ids ``[n]``."""
        # Of a batch, no offsets are computed: a half more tokens per second.
        (found,) = self._guarded(lambda: self._encoder.encode_batch_fast([text], add_special_tokens=False))
        ids = np.array(found.ids, np.int64)
        if ids.max(initial=0) >= self.vocab:
            raise HvdlmError(
                f"the tokenizer gave the id {ids.max()}, its vocabulary has {self.vocab} entries: use another."
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._guarded(lambda: self._encoder.decode([int(i) for i in ids], skip_special_tokens=False)))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return untrusted_input.guarded(action)
        except ValueError as error:
            raise HvdlmError(f"the tokenizer fails ({error}): check its tokenizer.json, or use another.") from error

    def to_json(self) -> dict[str, Any]:
        """Return kind and the Hugging Face description."""
        return {"kind": "bpe", "description": self._description}


def from_json(value: Any) -> Tokenizer:
    """Return the tokenizer that ``to_json`` described.

    Raises:
        HvdlmError: it is no tokenizer of ours.
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
        raise ValueError(f"it is of no known kind: {shown(repr(kind))}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise HvdlmError(
            f"the tokenizer description is damaged or foreign ({shown(str(error), 200)}): prepare the data anew."
        ) from error


def read(path: Path, within: Path | None = None) -> Tokenizer:
    """Return the tokenizer of a file that holds what ``to_json`` described; ``within``: a folder it has to lie in.

    Raises:
        HvdlmError: it is no tokenizer of ours; ValueError, OSError: the file can't be read.
    """
    return from_json(untrusted_input.read_json(path, LIMIT, within, SLACK))


def train(name: str, size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer ``name`` (see ``DataConfig.tokenizer``), trained on ``texts`` where it needs training.

    A file may be Hugging Face's or a run's own (``to_json``).

    Raises:
        HvdlmError: neither a known kind nor a readable tokenizer.json.
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
    try:
        value = untrusted_input.read_json(Path(name), LIMIT, slack=SLACK)
        return from_json(value) if isinstance(value, dict) and "kind" in value else BPETokenizer(json.dumps(value))
    except (ValueError, OSError) as error:
        raise HvdlmError(
            f"data.tokenizer {name}: can't be read: {error}: give a Hugging Face tokenizer.json."
        ) from error


def check(name: str) -> None:
    """Check that ``data.tokenizer`` names a kind or a file."""
    if name not in ("byte", "char", "word", "bpe") and not Path(name).is_file():
        raise HvdlmError(
            f"data.tokenizer {name!r} is neither byte, char, word or bpe nor the path of a tokenizer.json: "
            "choose one of them."
        )
