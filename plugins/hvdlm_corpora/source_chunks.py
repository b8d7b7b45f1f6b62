"""A source's text in chunks, each with its end position, from which reading can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from hvdlm.errors import HvdlmError


class SourcePosition(NamedTuple):
    """A position between two chunks of a source: reading resumed there gives the same chunks as reading on.

    ``offset``: unpacked bytes before it, for texts and JSON lines; ``number``: records before it, for records.
    """

    offset: int = 0
    number: int = 0


class SourceChunk(NamedTuple):
    """Some text of a source, about a megabyte, and the position of its end.

    ``record_ends``: of a source with records, the characters before the end of every record, without its separator.
    ``targets``: where they are not all targets, the ranges of characters (first, last exclusive) that are, ascending.
    """

    text: str
    end: SourcePosition
    record_ends: tuple[int, ...] = ()
    targets: tuple[tuple[int, int], ...] | None = None


class ReadProgress:
    """How far a source has been read.

    Attributes:
        hash: SHA-256 of the unpacked bytes so far.
        bytes_read: bytes that were read of the file on disk.
        skipped: records without a text, which are left out.
        without_targets: conversations without a turn of the assistant, which are left out.
        notes: what else of the source was left out, a sentence each.
    """

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.bytes_read = 0
        self.skipped = 0
        self.without_targets = 0
        self.notes: list[str] = []

    def left_out(self, field: str) -> list[str]:
        """Return a phrase on everything that was left out; ``field``: of records that are texts."""
        counts = {f"records without {field}": self.skipped, "conversations without an answer": self.without_targets}
        return [*self.notes, *(f"{count:,} {what} are left out" for what, count in counts.items() if count)]


START = SourcePosition()


def skip_bytes(chunks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """Yield what follows the first ``offset`` bytes, first the rest of the chunk in which they end, empty or not."""
    for chunk in chunks:
        if offset > len(chunk):
            offset -= len(chunk)
        else:
            yield chunk[offset:]
            offset = 0


def split_text(source: str, chunks: Iterator[bytes], offset: int, longest: int) -> Iterator[SourceChunk]:
    """Split a text from its byte ``offset`` on between words, or inside a word of more than ``longest`` bytes.

    A split lies in the raw chunk that was read last: when reading resumes, ``skip_bytes`` yields its rest first.

    Raises:
        HvdlmError: it is not UTF-8.
    """
    rest = next(chunks, b"") if offset else b""
    for chunk in chunks:
        rest += chunk
        # In UTF-8, the bytes of blanks and line ends occur in no other character.
        size = rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1 or (_whole(rest) if len(rest) > longest else 0)
        if size:
            text, rest = _decoded(source, rest[:size], offset), rest[size:]
            offset += size
            yield SourceChunk(text, SourcePosition(offset))
    if rest:
        yield SourceChunk(_decoded(source, rest, offset), SourcePosition(offset + len(rest)))


def _whole(data: bytes) -> int:
    """Return the number of bytes up to the end of the last whole character."""
    last = next((i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), 1)
    return len(data) - last


def _decoded(source: str, data: bytes, offset: int) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise HvdlmError(
            f"data.path {source}: byte {offset + error.start} is not UTF-8: convert it, for example with "
            "iconv -t UTF-8."
        ) from error
