"""What all kinds of tokenizers share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from hvdlm.errors import HvdlmError

Result = TypeVar("Result")


class Tokenizer:
    """Converts text to int32 ids below ``vocab`` and back; without special tokens unless a kind says otherwise.

    Attributes:
        vocab: number of ids.
        prefix: ids with which a document begins (BOS), for a tokenizer that adds them.
        suffix: ids with which it ends (EOS).
        special: how special tokens are spelled.
        rewrites: whether texts are changed before they are encoded (lower case, NFC), so that decoding restores others.
    """

    vocab: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    special: tuple[str, ...] = ()
    rewrites = False

    @property
    def text_vocab(self) -> int:
        """Return the number below which the ids of all plain text are: special tokens may lie above."""
        return self.vocab

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return int32 ids ``[n]``; raise HvdlmError where the text can't be written with this vocabulary.

        ``special``: whether the spelling of a special token (``<|endoftext|>``) stands for it; else it is plain text.
        """
        raise NotImplementedError

    def encode_offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of ``encode``, and for each the characters that it stands for, int64 ``[n, 2]``.

        They are the numbers of the first one and of the one after the last.

        Raises:
            HvdlmError: this kind of tokenizer doesn't know them, or can't write the text.
        """
        raise HvdlmError(
            "data.chat and data.prompt need a tokenizer that knows which characters a token stands for: give a "
            "tokenizer.json of Hugging Face, bpe, byte or char (--data.tokenizer)."
        )

    def encode_prompt(self, text: str, begin: bool = True) -> np.ndarray:
        """Return the ids of a text that is continued, with special tokens where it spells them; ``begin``: a prefix."""
        ids = self.encode(text, special=True)
        return np.concatenate([np.array(self.prefix, np.int32), ids]) if begin and self.prefix else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        raise NotImplementedError

    def byte_count(self, ids: Sequence[int]) -> int:
        """Return the bytes of the text that ids decode to."""
        return len(self.decode(ids).encode())

    def bytes_before(self, text: str, count: int, special: bool = False) -> int:
        """Return the bytes of ``text`` that its first ``count`` ids stand for."""
        return self.byte_count(self.encode(text, special)[:count].tolist())

    def within_budget(self, size: int, action: Callable[[], Result]) -> Result:
        """Return the result of ``action``, in which this tokenizer reads or writes ``size`` characters.

        A kind of which some tokenizers take hours for a short text raises HvdlmError where this one takes too long.
        """
        return action()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which ``from_json`` makes an equal tokenizer."""
        raise NotImplementedError

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: equal tokenizers have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def spells_special(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a special token is spelled in ``text``."""
    return any(token and token in text for token in tokenizer.special)
