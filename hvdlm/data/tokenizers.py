"""Tokenizers by their descriptions in JSON, never pickled: bytes, ids, and kinds of plugins (``hvdlm_tokenizers``)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.tokenizer_kind import TokenizerKind

LIMIT = 1 << 26  # bytes of a tokenizer's file
_MAX_VOCAB = 2**31 - 1  # ids are int32
SLACK = 1 << 24  # bytes that reading one may take beyond 10 times its file's size: a vocabulary is many small objects


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: 256 ids for any text."""

    vocab = 256

    @staticmethod
    def train(texts: Iterable[str], size: int | None = None) -> ByteTokenizer:
        """Return the tokenizer; nothing is read."""
        return ByteTokenizer()

    @staticmethod
    def load(description: Mapping[str, Any]) -> ByteTokenizer:
        """Return the tokenizer."""
        return ByteTokenizer()

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return the bytes as int32 ``[n]``."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes, and for each its character."""
        ids = self.encode(text)
        characters = np.cumsum(ids & 0xC0 != 0x80) - 1  # the bytes of a character after the first begin with 10
        return ids, np.stack([characters, characters + 1], 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; invalid UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def byte_count(self, ids: Sequence[int]) -> int:
        """Return the number of ids, also where a character is cut off."""
        return len(ids)

    def to_json(self) -> dict[str, Any]:
        """Return the kind alone."""
        return {"kind": "byte"}


class IdTokenizer(Tokenizer):
    """Ids as decimal numbers between blanks: for token files without a tokenizer, whose text isn't known."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    @staticmethod
    def load(description: Mapping[str, Any]) -> IdTokenizer:
        """Return the tokenizer of a description."""
        vocab = description["vocab"]
        if type(vocab) is not int or not 0 < vocab <= _MAX_VOCAB:
            raise ValueError(f"its vocabulary size is {shown(repr(vocab))}")
        return IdTokenizer(vocab)

    @staticmethod
    def train(texts: Iterable[str], size: int | None = None) -> IdTokenizer:
        """Return the tokenizer of ``size`` ids; nothing is read."""
        if size is None or size > _MAX_VOCAB:
            raise HvdlmError("data.tokenizer ids needs the number of ids: --data.vocab_size 50257, for example.")
        return IdTokenizer(size)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return the int32 ids ``[n]`` that a text lists; raise HvdlmError for anything else than ids."""
        numbers = text.split()
        for number in numbers:
            if not (number.isascii() and number.isdigit() and len(number) < 11 and int(number) < self.vocab):
                raise HvdlmError(
                    f"{shown(repr(number))} is no id below {self.vocab}: without a tokenizer (--data.tokenizer "
                    "PATH/tokenizer.json), texts are lists of ids, such as '464 3280 318'."
                )
        return np.array(numbers, np.int64).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids with blanks between them."""
        return " ".join(str(int(i)) for i in ids)

    def to_json(self) -> dict[str, Any]:
        """Return kind and number of ids."""
        return {"kind": "ids", "vocab": self.vocab}


BUILT_IN: dict[str, TokenizerKind] = {"byte": ByteTokenizer, "ids": IdTokenizer}
"""Kinds that need no plugin, by their names."""


@functools.lru_cache(maxsize=64)
def find_kind(name: str) -> TokenizerKind | None:
    """Return the kind of tokenizers ``name``: one that is built in, or of ``hvdlm_corpora`` or any installed plugin."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    kinds = plugins.provided(plugins.load(["corpora", name]), "tokenizers", name)
    if name not in kinds and not {"/", "."} & set(name):  # not the path of a file
        others = [plugin for plugin, names in plugins.collections("tokenizers").items() if name in names]
        kinds = plugins.provided(plugins.load(others), "tokenizers", name)
    return kinds.get(name)


def from_json(value: Any) -> Tokenizer:
    """Return the tokenizer that ``to_json`` described, from an untrusted value.

    Raises:
        HvdlmError: it is not the description of a tokenizer.
    """
    try:
        name = value["kind"]
        if (kind := find_kind(name) if isinstance(name, str) else None) is None:
            raise ValueError(f"it is of no known kind: {shown(repr(name))}, which a plugin may bring")
        return kind.load(value)
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
