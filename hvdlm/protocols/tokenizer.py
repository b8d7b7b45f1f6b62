"""Tokenizers: text to ids and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np


Result = TypeVar("Result")


class Tokenizer(Protocol):
    """What training and generation call of a tokenizer; ``hvdlm.data.tokenizer_base.Tokenizer`` is a base class.

    Preparing token files calls more of that class, which derives it from these methods.

    Attributes:
        vocab: ids are below it.
    """

    @property
    def vocab(self) -> int:
        """The number of ids."""

    @property
    def hash(self) -> str:
        """Identifies the tokenizer: a checkpoint is only resumed with the one that it was trained with."""

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return int32 ids ``[n]``, of which ``decode`` restores the text.

        ``special``: whether the spelling of a special token stands for it; else it is plain text.

        Raises:
            HvdlmError: the text can't be written with this vocabulary.
        """

    def encode_prompt(self, text: str, begin: bool = True) -> np.ndarray:
        """Return the ids of a text that is continued, special tokens included; ``begin``: with a document's first."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def within_budget(self, size: int, action: Callable[[], Result]) -> Result:
        """Return the result of ``action``, in which this tokenizer reads or writes ``size`` characters.

        Raises:
            HvdlmError: it takes too long.
        """

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``tokenizer.json``, from which ``hvdlm.data.tokenizers`` makes an equal tokenizer."""
