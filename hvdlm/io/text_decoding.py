"""The one decoder for text from outside: byte order marks, UTF-16, line ends, lone surrogates."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain

# The mark of UTF-32 begins with that of UTF-16: it is compared first.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LONGEST_MARK = 4
_HEAD = 8000  # bytes in which a NUL byte means that a file is no text; git has the same rule
_SURROGATE = re.compile("[\ud800-\udfff]")


def as_utf8(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield the text in ``chunks`` as UTF-8 without a byte order mark, its lines ended by ``\n``.

    A mark selects UTF-16 or UTF-32; anything else is taken for UTF-8 and not checked here. The chunks that are yielded
    depend on those that are given alone.

    Raises:
        ValueError: it holds NUL bytes, as binary files do, or is invalid UTF-16 or UTF-32.
    """
    chunks = iter(chunks)
    first = b""
    while len(first) < _LONGEST_MARK and (chunk := next(chunks, b"")):
        first += chunk
    mark, encoding = next(((m, e) for m, e in MARKS.items() if first.startswith(m)), (b"", "utf-8"))
    transcoded = _transcode(chain([first[len(mark) :]], chunks), encoding)
    head = next(transcoded, b"")
    if b"\0" in head[:_HEAD]:
        raise ValueError("it holds NUL bytes, as binary files do")
    yield from _with_plain_line_ends(chain([head], transcoded))


def _transcode(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    if encoding == "utf-8":
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for chunk in chunks:
        yield decoder.decode(chunk).encode()
    decoder.decode(b"", True)


def _with_plain_line_ends(chunks: Iterator[bytes]) -> Iterator[bytes]:
    held = b""  # a carriage return at a chunk's end, which the next chunk may continue
    for chunk in chunks:
        whole = held + chunk
        held = b"\r" if whole.endswith(b"\r") else b""
        yield whole[: len(whole) - len(held)].replace(b"\r\n", b"\n")
    if held:
        yield held


def decode(data: bytes) -> str:
    """Return the text that ``data`` holds; see ``as_utf8``.

    Raises:
        ValueError: it is neither UTF-8 nor text of another encoding with a mark.
    """
    return str(b"".join(as_utf8([data])), "utf-8")


def without_surrogates(text: str) -> str:
    r"""Return ``text`` with lone surrogates replaced by U+FFFD.

    JSON can spell them (``"\ud83d"``), and Python has them for bytes of the command line that are not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
