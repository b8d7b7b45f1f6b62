"""Tokenizers: byte, character, word, and BPE through Hugging Face ``tokenizers``. Kept as JSON, never pickled."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdlm.interfaces import HvdlmError


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
        self._table = np.full(int(points.max()) + 1, -1, np.int32)
        self._table[points] = np.arange(self.vocab)

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
        bad = (points >= len(self._table)) | (ids < 0)
        if bad.any():
            character = text[int(bad.argmax())]
            raise HvdlmError(
                f"character {character!r} is not among the {self.vocab} that the model knows: leave it out, or train "
                "with --data.tokenizer byte, which knows all."
            )
        return ids

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


class BPETokenizer(_Hashed):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained or loaded by Hugging Face ``tokenizers``."""

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as Encoder

        try:
            self._encoder = Encoder.from_str(description)
        except Exception as error:  # the library raises plain Exception
            raise HvdlmError(f"the tokenizer file is no Hugging Face tokenizer.json: {error}.") from error
        self._description = json.loads(description)
        self.vocab = self._encoder.get_vocab_size()

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
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._encoder.decode([int(i) for i in ids], skip_special_tokens=False))

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
        if kind == "char" and isinstance(value["characters"], str) and value["characters"]:
            return CharTokenizer(value["characters"])
        if kind == "word" and all(isinstance(word, str) for word in value["words"]):
            return WordTokenizer(value["words"])
        if kind == "bpe":
            return BPETokenizer(json.dumps(value["description"]))
        raise KeyError(kind)
    except (KeyError, TypeError) as error:
        raise HvdlmError(
            f"the tokenizer description is damaged or foreign ({error}): prepare the data anew."
        ) from error


def train(name: str, size: int | None, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer ``name`` (see ``DataConfig.tokenizer``), trained on ``texts`` where it needs training.

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
    return BPETokenizer(Path(name).read_text(encoding="utf-8"))


def check(name: str) -> None:
    """Check that ``data.tokenizer`` names a kind or a file."""
    if name not in ("byte", "char", "word", "bpe") and not Path(name).is_file():
        raise HvdlmError(
            f"data.tokenizer {name!r} is neither byte, char, word or bpe nor the path of a tokenizer.json: "
            "choose one of them."
        )
