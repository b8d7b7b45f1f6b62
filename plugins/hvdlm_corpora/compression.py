"""Unpacks gzip, bzip2, xz and Zstandard files in bounded memory."""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hvdlm.io import untrusted_input

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
RATIO = 1000.0
"""Default of ``data.max_expansion``: text is packed 3 to 5 times smaller, the most repetitive log some 100 times."""

FREE = 1 << 26
"""Bytes up to which any ratio is allowed."""

_READ = 1 << 16  # packed bytes that are read at a time
_DICTIONARY = 1 << 27  # bytes of xz's and Zstandard's history: xz -9 uses 64 MiB, zstd --long 128 MiB
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}


def unpacked_limit(size: int, ratio: float = RATIO) -> float:
    """Return how many bytes a file of ``size`` bytes may unpack to."""
    return max(FREE, ratio * size)


def suffix(name: str) -> str:
    """Return the suffix of a packed file's ``name``, empty for any other file."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def unpack(file: BinaryIO, name: str, size: int, notes: list[str] | None = None) -> Iterator[bytes]:
    """Yield the content of an open file, unpacked as its ``name`` says, ``size`` bytes at a time (the last: fewer).

    Bytes that follow the last member of a packed file are left out, as gunzip does, with a sentence in ``notes``.

    Raises:
        ValueError, OSError: it is damaged or ends early, or nothing installed can unpack it.
    """
    kind = suffix(name)
    if not kind:
        yield from iter(lambda: file.read(size), b"")
        return
    try:
        chunks = _zstandard(file, size) if kind == ".zst" else _members(file, kind, size, notes)
        yield from _of_size(chunks, size)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"it can't be unpacked ({error})") from error


def read_unpacked(path: Path, limit: int) -> bytes:
    """Return the content of the regular file ``path``, unpacked if its name says so, at most ``limit`` bytes.

    Raises:
        ValueError, OSError: it is larger, not a regular file, damaged, a decompression bomb, or missing.
    """
    size = untrusted_input.size(path)
    allowed = min(limit, int(unpacked_limit(size))) if suffix(path.name) else limit
    verb = "unpacks to" if suffix(path.name) else "holds"
    content, count = [], 0
    with path.open("rb") as file:
        for chunk in unpack(file, path.name, 1 << 20):
            content.append(chunk)
            count += len(chunk)
            if count > allowed:
                raise ValueError(f"{path.name} {verb} more than {allowed:,} bytes")
    return b"".join(content)


def _of_size(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes, ``size`` at a time: where a library stops may differ between its versions."""
    buffered = bytearray()
    for chunk in chunks:
        buffered += chunk
        while len(buffered) >= size:
            yield bytes(buffered[:size])
            del buffered[:size]
    if buffered:
        yield bytes(buffered)


class _Gzip:
    """zlib's decompressor with the interface of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        self.needs_input = len(out) < max_length and not self._stream.unconsumed_tail
        return out


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": _Gzip,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=_DICTIONARY),
}


def _members(file: BinaryIO, kind: str, size: int, notes: list[str] | None) -> Iterator[bytes]:
    data = file.read(_READ)
    while True:
        decompressor = _DECOMPRESSORS[kind]()
        while not decompressor.eof:
            if decompressor.needs_input and not data and not (data := file.read(_READ)):
                raise EOFError("it ends early")
            out = decompressor.decompress(data, size)
            data = b""
            yield out
        data = decompressor.unused_data or file.read(_READ)
        if len(data) < _READ:
            data += file.read(_READ)
        data = data.lstrip(b"\0")  # padding, of tapes and of xz
        if not data.startswith(_MAGIC[kind]):
            break
    if data and notes is not None:
        notes.append("the bytes after the end of its packed content are left out")


class _LeftOpen:
    """A file for pyarrow, which would close it when the last reader is deleted."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read

    def close(self) -> None:
        """Leave the file open."""


def _zstandard(file: BinaryIO, size: int) -> Iterator[bytes]:
    reader = _open_zstandard(file)
    while chunk := untrusted_input.guarded(lambda: reader.read(size)):
        yield bytes(chunk)


def _open_zstandard(file: BinaryIO) -> Any:
    """Return a reader, of Python 3.14, of the package zstandard or of pyarrow."""
    try:
        return importlib.import_module("compression.zstd").ZstdFile(file)
    except ImportError:
        pass
    try:
        library = importlib.import_module("zstandard")
        options = {"read_across_frames": True, "closefd": False}
        return library.ZstdDecompressor(max_window_size=_DICTIONARY).stream_reader(file, **options)
    except ImportError:
        pass
    try:
        arrow = importlib.import_module("pyarrow")
        return arrow.CompressedInputStream(arrow.PythonFile(_LeftOpen(file), mode="r"), "zstd")
    except ImportError as error:
        raise ValueError("unpacking .zst needs zstandard: pip install zstandard, or unpack it with zstd -d") from error
