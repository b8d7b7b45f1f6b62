"""Reads text from files, records, folders, globs, gzip, standard input or the embedded corpus, in bounded memory."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files, text_decoding
from hvdlm.io.atomic_files import sha256
from hvdlm_corpora import compression, corpus_files, documents, tables
from hvdlm_corpora.documents import Form
from hvdlm_corpora.source_chunks import (
    START,
    ReadProgress,
    SourceChunk,
    SourcePosition,
    skip_bytes,
    split_text,
)

_CHUNK = 1 << 20  # bytes that are read at a time
_HEAD = 1 << 16  # bytes at the start of a text
_FORM = Form()


def embedded() -> str:
    """Return the text of the Python language reference that ships with every Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def expand(paths: Sequence[str], field: str = _FORM.field) -> list[str]:
    """Return all sources that ``paths`` name, in order; ``field``: of records that are texts.

    Raises:
        HvdlmError: a path names nothing readable.
    """
    return [source for path in paths for source in corpus_files.find(path, field).files]


def raw_chunks(source: str, progress: ReadProgress | None = None, form: Form = _FORM) -> Iterator[bytes]:
    """Yield the bytes of one source, unpacked, and update ``progress``."""
    progress = progress or ReadProgress()
    if source == "embedded":
        data = embedded().encode()
        progress.hash.update(data)
        progress.bytes_read = len(data)
        yield data
        return
    count = 0
    try:
        limit = documents.text_limit(source, form) if compression.suffix(source) else math.inf
        with open(source, "rb") as on_disk:
            for chunk in compression.unpack(on_disk, source, _CHUNK, progress.notes):
                count += len(chunk)
                if count > limit:
                    raise documents.expands(source, form)
                progress.hash.update(chunk)
                progress.bytes_read = on_disk.tell()
                yield chunk
    except (OSError, ValueError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {error}.") from error


def text_chunks(
    source: str, form: Form = _FORM, start: SourcePosition = START, progress: ReadProgress | None = None
) -> Iterator[SourceChunk]:
    """Yield the text of one source from ``start`` on, in chunks that end at a line's end, a blank or a record's end.

    The bytes before ``start`` are read too, except for tables, so that ``progress`` has the SHA-256 of all at the end.

    Raises:
        HvdlmError: it can't be read, is not text, or a record is damaged.
    """
    progress = progress or ReadProgress()
    if documents.is_table(source):
        return tables.read(source, form, start, progress)
    text = _as_utf8(source, raw_chunks(source, progress, form))
    if documents.kind(source):
        return documents.read(source, text, form, start, progress)
    return split_text(source, skip_bytes(text, start.offset), start.offset, 16 * _CHUNK)


def _as_utf8(source: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from text_decoding.as_utf8(chunks)
    except ValueError as error:
        raise HvdlmError(
            f"data.path {source}: is not text: {error}: leave it out, or convert it, for example with iconv -t UTF-8."
        ) from error


def is_decoded(source: str) -> bool:
    """Return whether the start of a text shows that it isn't read byte for byte: it has a mark or other line ends."""
    try:
        with open(source, "rb") as file:
            head = next(compression.unpack(file, source, _HEAD), b"")
    except (OSError, ValueError):
        return False  # reading it will say what is wrong
    return not documents.kind(source) and (head.startswith(tuple(text_decoding.MARKS)) or b"\r\n" in head)


def digest(source: str, progress: ReadProgress) -> str:
    """Return the SHA-256 of the unpacked bytes of a source that has been read to its end."""
    # A table's bytes are not read in the order of the file.
    return sha256(Path(source)) if documents.is_table(source) else progress.hash.hexdigest()


def size(source: str) -> int:
    """Return a source's size on disk in bytes."""
    return len(embedded().encode()) if source == "embedded" else os.path.getsize(source)


def texts(paths: Sequence[str], form: Form = _FORM, on_read: Callable[[int], object] | None = None) -> Iterator[str]:
    """Yield the text of all sources in chunks, in bounded memory.

    ``on_read`` is called after every chunk with the bytes on disk that were read for it.

    Raises:
        HvdlmError: a source can't be read or is not UTF-8, or there is no text at all.
    """
    empty = True
    for source in expand(paths, form.field):
        progress, before = ReadProgress(), 0
        for chunk in text_chunks(source, form, progress=progress):
            empty = False
            yield chunk.text
            if on_read:
                on_read(progress.bytes_read - before)
            before = progress.bytes_read
    if empty:
        raise no_text(paths)


def no_text(paths: Sequence[str]) -> HvdlmError:
    """Return the error of a corpus without any text."""
    return HvdlmError(f"data.path {', '.join(paths)}: the corpus is empty: give a file with text.")


def spool(folder: Path) -> str:
    """Copy standard input to a file in ``folder``, named by its content's hash, and return its path.

    Raises:
        HvdlmError: it is a terminal, or the folder can't be written.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise HvdlmError("data.path -: standard input is a terminal: pipe a text into it, or give a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with process.during("reading standard input", patience=math.inf):  # of the user's own command
            return str(_copy_stdin(folder))
    except OSError as error:
        raise HvdlmError(
            f"data.path -: standard input can't be saved in {folder}: {error.strerror}: free space or choose another "
            "folder (--data.cache FOLDER)."
        ) from error


def _copy_stdin(folder: Path) -> Path:
    hashed = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".stdin-", delete=False) as file:
        try:
            while chunk := sys.stdin.buffer.read(_CHUNK):
                hashed.update(chunk)
                file.write(chunk)
            file.flush()
            path = folder / f"stdin-{hashed.hexdigest()[:24]}.txt"
            if not path.exists():
                os.replace(file.name, path)
        finally:  # an input that fills the disk leaves no file behind
            safe_files.delete_file(Path(file.name))
    return path
