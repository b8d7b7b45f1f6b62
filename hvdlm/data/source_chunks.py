"""How a source is read: in pieces, each of which says where the next one begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from hvdlm.errors import HvdlmError


class Place(NamedTuple):
    """A place between two pieces of a source. What is read from there on is the same whether or not it was left there.

    ``offset``: bytes before it (unpacked), of texts and JSON lines; ``number``: records before it, of records.
    """

    offset: int = 0
    number: int = 0


class Piece(NamedTuple):
    """Some text of a source, about a megabyte, and the place where it ends."""

    text: str
    end: Place


class Reading:
    """How far a source has been read: ``hashed`` of its unpacked bytes, ``done`` bytes of it as it lies on disk."""

    def __init__(self) -> None:
        self.hashed, self.done = hashlib.sha256(), 0


START = Place()


def behind(chunks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """Yield what follows the first ``offset`` bytes, first the rest of the chunk in which they end, empty or not."""
    for chunk in chunks:
        if offset > len(chunk):
            offset -= len(chunk)
        else:
            yield chunk[offset:]
            offset = 0


def cut(source: str, chunks: Iterator[bytes], offset: int, longest: int) -> Iterator[Piece]:
    """Cut a text from its byte ``offset`` on where no word is torn apart; one of ``longest`` bytes is, all the same.

    A cut lies in the chunk that was read last. What is left of that, ``behind`` yields first where reading goes on.

    Raises:
        HvdlmError: it is not UTF-8.
    """
    rest = next(chunks, b"") if offset else b""
    for chunk in chunks:
        rest += chunk
        # Blanks and line ends never are part of another character in UTF-8.
        size = rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1 or (_whole(rest) if len(rest) > longest else 0)
        if size:
            text, rest = _decoded(source, rest[:size], offset), rest[size:]
            offset += size
            yield Piece(text, Place(offset))
    if rest:
        yield Piece(_decoded(source, rest, offset), Place(offset + len(rest)))


def _whole(data: bytes) -> int:
    """Return how many of the bytes are whole characters."""
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
