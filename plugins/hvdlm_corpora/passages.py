"""Texts with the documents in them: where special tokens (BOS, EOS, separators) are added when they are encoded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hvdlm.data.tokenizer_base import Tokenizer, spells_special
from hvdlm_corpora.source_chunks import SourceChunk, SourcePosition

_SEARCHED = 512  # special tokens that are looked for: an expression of all in a hostile tokenizer would take minutes


@dataclass(frozen=True)
class SpecialTokens:
    """The options on special tokens; see ``DataConfig``.

    Attributes:
        separator: the text after every record; where it spells special tokens, it stands for them.
        add: whether what the tokenizer adds to a document is added.
        split: whether documents that spell special tokens hold plain text.
        begin: ids that begin every document.
        end: ids that end every document.
        align: whether every document is encoded by itself, whatever begins and ends it.
    """

    separator: str = "\n"
    add: bool = True
    split: bool = True
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    align: bool = False


@dataclass(frozen=True)
class Passage:
    """A text of one source, about a megabyte.

    Attributes:
        text: the documents in it, or a part of one, each followed by the separator where the source holds records.
        begins: whether a document begins where it begins.
        ends: characters before the end of every document that ends in it.
        options: how special tokens are treated.
        targets: see ``SourceChunk``.
    """

    text: str
    begins: bool
    ends: tuple[int, ...]
    options: SpecialTokens
    targets: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        """Return the number of characters."""
        return len(self.text)


def passages(
    chunks: Iterable[tuple[SourceChunk, int]], first: bool, options: SpecialTokens
) -> Iterator[tuple[Passage, SourcePosition, int]]:
    """Yield the chunks of a source as passages, with their ends and the numbers that came with the chunks.

    A source that doesn't hold records is one document. ``first``: whether it begins with the first chunk.
    """
    before: tuple[SourceChunk, int] | None = None
    for chunk in chunks:
        if before is not None:
            yield _passage(before[0], first, False, options), before[0].end, before[1]
            first = False
        before = chunk
    if before is not None:
        yield _passage(before[0], first, True, options), before[0].end, before[1]


def _passage(chunk: SourceChunk, first: bool, last: bool, options: SpecialTokens) -> Passage:
    if chunk.record_ends:
        return Passage(chunk.text, True, chunk.record_ends, options, chunk.targets)
    return Passage(chunk.text, first, (len(chunk.text),) if last else (), options)


class EncodedPassage(NamedTuple):
    """The ``ids`` of a passage, int32 ``[n]``, and the ``starts`` of its documents in them, int64 ``[documents]``.

    Without starts where documents aren't encoded one by one. ``targets``: uint8 ``[n]``, 1 where an id is a target;
    None: all are.
    """

    ids: np.ndarray
    starts: np.ndarray
    targets: np.ndarray | None = None


def encode(tokenizer: Tokenizer, passage: Passage) -> EncodedPassage:
    """Return a passage's ids; raise HvdlmError where it can't be written with the vocabulary."""
    if passage.targets is not None:
        return _encode_marked(tokenizer, passage, np.array(passage.targets, np.int64).reshape(-1, 2))
    ids, starts, position = [np.zeros(0, np.int32)], [], 0
    for segment in _segments(tokenizer, passage):
        if segment.begins:
            starts.append(position)
        content = segment.content
        ids.append(tokenizer.encode(content, segment.special) if isinstance(content, str) else content)
        position += len(ids[-1])
    return EncodedPassage(ids[1] if len(ids) == 2 else np.concatenate(ids), np.array(starts, np.int64))


def _encode_marked(tokenizer: Tokenizer, passage: Passage, ranges: np.ndarray) -> EncodedPassage:
    """Return a passage's ids, of which those are targets that stand for a character of ``ranges``, int64 ``[n, 2]``.

    What is added at the end of a document is a target if the token before it is one.
    """
    ids, targets, starts, position = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [], 0
    for segment in _segments(tokenizer, passage):
        if segment.begins:
            starts.append(position)
        if isinstance(segment.content, str):
            own, offsets = tokenizer.encode_offsets(segment.content, segment.special)
            first, last = offsets[:, 0] + segment.start, offsets[:, 1] + segment.start
            number = np.searchsorted(ranges[:, 1], first, "right")  # the first range that ends after the token begins
            begin = np.append(ranges[:, 0], len(passage.text))[number]
            marks = ((begin < last) & (first < last)).astype(np.uint8)
        else:
            own = segment.content
            follows = not segment.begins and len(targets[-1]) > 0 and bool(targets[-1][-1])
            marks = np.full(len(own), follows, np.uint8)
        if len(own):
            ids.append(own)
            targets.append(marks)
        position += len(own)
    return EncodedPassage(np.concatenate(ids), np.array(starts, np.int64), np.concatenate(targets))


def begins_documents(tokenizer: Tokenizer, options: SpecialTokens) -> bool:
    """Return whether documents are encoded one by one, so that each begins with a token of its own."""
    prefix, suffix = _added(tokenizer, options)
    return bool(prefix or suffix or options.align or spells_special(tokenizer, options.separator))


def spelled(tokenizer: Tokenizer, options: SpecialTokens) -> re.Pattern[str] | None:
    """Return an expression of the special tokens that documents might spell in vain, None where there are none."""
    tokens = [re.escape(token) for token in tokenizer.special[:_SEARCHED] if token]
    return re.compile("|".join(tokens)) if tokens and options.split else None


def bytes_before(tokenizer: Tokenizer, passage: Passage, count: int) -> int:
    """Return how many bytes of a passage its first ``count`` ids stand for."""
    size = 0
    for content, special, *_ in _segments(tokenizer, passage):
        ids = tokenizer.encode(content, special) if isinstance(content, str) else content
        if count < len(ids):
            return size + (tokenizer.bytes_before(content, count, special) if isinstance(content, str) else 0)
        size += len(content.encode()) if isinstance(content, str) else 0
        count -= len(ids)
    return size


def preserved(tokenizer: Tokenizer, passage: Passage) -> bool:
    """Return whether decoding restores a passage's text, but for blanks at its ends."""
    return tokenizer.decode(tokenizer.encode(passage.text).tolist()).strip() == passage.text.strip()


class _Segment(NamedTuple):
    """A part of a passage.

    Attributes:
        content: a text, or added ids.
        special: whether the text may spell special tokens.
        begins: whether a document begins with it.
        start: characters of the passage before a text.
    """

    content: str | np.ndarray
    special: bool = False
    begins: bool = False
    start: int = 0


def _added(tokenizer: Tokenizer, options: SpecialTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that begin and end a document: the tokenizer's own, or else those of the options."""
    own = (tokenizer.prefix, tokenizer.suffix) if options.add else ((), ())
    return own[0] or options.begin, own[1] or options.end


def _segments(tokenizer: Tokenizer, passage: Passage) -> Iterator[_Segment]:
    """Yield the texts of a passage and what is added to its documents, in order."""
    options = passage.options
    separator = options.separator
    control = spells_special(tokenizer, separator)
    if not begins_documents(tokenizer, options):  # in one go, so that tokens may lie across documents
        yield _Segment(passage.text, not options.split)
        return
    prefix, suffix = (np.array(ids, np.int32) for ids in _added(tokenizer, options))
    start, begins = 0, passage.begins
    for end in passage.ends:
        if begins:
            yield _Segment(prefix, begins=True)
        rest = end + len(separator)
        yield _Segment(passage.text[start : end if control else rest], not options.split, start=start)
        yield _Segment(suffix)
        if control:
            yield _Segment(passage.text[end:rest], True, start=end)
        start, begins = rest, True
    if passage.text[start:]:
        if begins:
            yield _Segment(prefix, begins=True)
        yield _Segment(passage.text[start:], not options.split)
