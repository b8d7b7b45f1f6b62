"""Byte-pair encoding and any other Hugging Face tokenizer.json, through the library ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from hvdlm.data.tokenizer_base import Result, Tokenizer
from hvdlm.data.tokenizers import SLACK
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import time_limit
from hvdlm_corpora.tokenizer_expansion import expansion

_MAX_EXPANSION = 256  # text that gets longer than so many times before encoding is a decompression bomb
_PROBES = ("a", "0", ".", "\u4e00")  # texts of which a vocabulary knows at least one


def _vocab(entries: Mapping[str, int]) -> int:
    """Return how many ids a model needs: the highest one plus 1.

    Raises:
        ValueError: most ids below the highest are unused.
    """
    highest = max(entries.values(), default=-1)
    if highest >= 2 * len(entries) + 1024:
        raise ValueError(f"it has {len(entries)} entries and the id {highest}")
    return highest + 1


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained or loaded by Hugging Face ``tokenizers``."""

    def __init__(self, description: str) -> None:
        from tokenizers import Tokenizer as Encoder

        try:
            self._description = untrusted_input.parse_json(description, SLACK)
            # Serialised again: where a key occurs twice, the library must get the value that is checked here.
            canonical = json.dumps(self._description)
            self._encoder = untrusted_input.guarded(lambda: Encoder.from_str(canonical))
            # Options for batches of short texts, which would truncate or pad a corpus.
            self._encoder.no_truncation()
            self._encoder.no_padding()
            entries = self._encoder.get_vocab()
            self.vocab = _vocab(entries)
            added = self._encoder.get_added_tokens_decoder().items()
            special = {number: token.content for number, token in added if token.special}
            self.special = tuple(special.values())
            self._text_vocab = 1 + max((i for i in entries.values() if i not in special), default=-1)
            expanded = expansion(self._description)
            # Nothing is encoded, not even for the template, before it is known not to expand without bound.
            self.prefix, self.suffix = self._template() if expanded <= _MAX_EXPANSION else ((), ())
            if max(expanded, len(self.prefix) + len(self.suffix)) > _MAX_EXPANSION:
                raise ValueError(f"it makes text more than {_MAX_EXPANSION} times longer")
            self.rewrites = self._description.get("normalizer") is not None
        except (ValueError, RecursionError) as error:
            raise HvdlmError(
                f"the tokenizer file is not a Hugging Face tokenizer.json: {shown(str(error), 200)}."
            ) from error

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that its post-processor adds before and after a text.

        Raises:
            ValueError: they are not in the vocabulary.
        """
        for probe in _PROBES:
            encoding = untrusted_input.guarded(lambda probe=probe: self._encoder.encode(probe))  # type: ignore[misc]
            added, ids = [bool(flag) for flag in encoding.special_tokens_mask], encoding.ids
            if False in added:
                break
        else:
            return (), ()
        prefix, suffix = ids[: added.index(False)], ids[len(ids) - added[::-1].index(False) :]
        if max([*prefix, *suffix], default=0) >= self.vocab:
            raise ValueError(f"its post-processor adds the id {max(ids)}, its vocabulary has {self.vocab} entries")
        return tuple(prefix), tuple(suffix)

    @property
    def text_vocab(self) -> int:
        """Return the ids below which those of all plain text are: special tokens that text doesn't yield excepted."""
        return self._text_vocab

    @staticmethod
    def load(description: Mapping[str, Any]) -> BPETokenizer:
        """Return the tokenizer of a description."""
        return BPETokenizer(json.dumps(description["description"]))

    @staticmethod
    def train(texts: Iterable[str], size: int | None = None) -> BPETokenizer:
        """Return a tokenizer of at most ``size`` entries (None: 4096)."""
        from tokenizers import Tokenizer as Encoder
        from tokenizers import decoders, models, pre_tokenizers, trainers

        encoder = Encoder(models.BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoder.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size or 4096, initial_alphabet=alphabet, show_progress=False)
        encoder.train_from_iterator(texts, trainer)
        return BPETokenizer(encoder.to_str())

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Return int32 ids ``[n]``; see ``Tokenizer``. Added tokens that aren't special are always recognised."""
        self._encoder.encode_special_tokens = not special
        # Encoding a batch computes no offsets: half as many tokens per second more.
        (encoding,) = self._guarded(lambda: self._encoder.encode_batch_fast([text], add_special_tokens=False))
        return self._checked(encoding.ids)

    def _checked(self, numbers: Sequence[int]) -> np.ndarray:
        ids = np.array(numbers, np.int64)
        if ids.max(initial=0) >= self.vocab:
            raise HvdlmError(
                f"the tokenizer returned the id {ids.max()}, its vocabulary has {self.vocab} entries: use another."
            )
        return ids.astype(np.int32)

    def encode_offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, and the characters that each stands for, by the library's offsets."""
        encoding = self._encoded(text, special)
        numbers = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding.ids))
        return self._checked(encoding.ids), numbers.reshape(-1, 2)

    def _encoded(self, text: str, special: bool) -> Any:
        self._encoder.encode_special_tokens = not special
        # A batch lets other threads run: see ``decode``.
        return self._guarded(lambda: self._encoder.encode_batch([text], add_special_tokens=False))[0]

    def bytes_before(self, text: str, count: int, special: bool = False) -> int:
        """Return the bytes of ``text`` before the end of its ``count``-th id, by the library's offsets."""
        end = max((end for _, end in self._encoded(text, special).offsets[:count]), default=0)
        return len(text[:end].encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        # Decoding a batch lets other threads run, among them one that limits its time.
        batch = [[int(i) for i in ids]]
        return str(self._guarded(lambda: self._encoder.decode_batch(batch, skip_special_tokens=False))[0])

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return untrusted_input.guarded(action)
        except ValueError as error:
            raise HvdlmError(f"the tokenizer fails ({error}): check its tokenizer.json, or use another.") from error

    def within_budget(self, size: int, action: Callable[[], Result]) -> Result:
        """Return the result of ``action``; raise TooSlow where it takes much more processor time than any should."""
        return time_limit.limited(size, action, self._description)

    def to_json(self) -> dict[str, Any]:
        """Return kind and the Hugging Face description."""
        return {"kind": "bpe", "description": self._description}
