"""Reads text from files, records, folders, globs, gzip, standard input or the embedded corpus, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import hashlib
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hvdlm.data import documents, splits
from hvdlm.data.documents import Form
from hvdlm.data.source_chunks import (
    START,
    ReadProgress,
    SourceChunk,
    SourcePosition,
    skip_bytes,
    split_text,
)
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files, untrusted_input
from hvdlm.io.atomic_files import sha256

_CHUNK = 1 << 20  # bytes that are read at a time
SUFFIXES = (".txt", ".md", ".text", ".gz", *documents.SUFFIXES)
_FORM = Form()


def embedded() -> str:
    """Return the text of the Python language reference that ships with every Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def expand(paths: Sequence[str]) -> list[str]:
    """Return all sources that ``paths`` name: files in order, "embedded" and "-" unchanged.

    Raises:
        HvdlmError: a path names nothing readable.
    """
    expanded: list[str] = []
    for path in paths:
        if path == "embedded":
            expanded.append(path)
        elif os.path.isdir(path):
            if not os.access(path, os.R_OK | os.X_OK):
                raise HvdlmError(f"data.path {path}: this user can't read it: change its permissions or path.")
            splits.check_one(Path(path))
            unrelated = splits.unrelated_files(Path(path))
            files = sorted(
                str(p)
                for p in Path(path).rglob("*")
                if p.is_file() and p.name.endswith(SUFFIXES) and p not in unrelated
            )
            if not files:
                raise HvdlmError(f"data.path {path}: the folder holds no {', '.join(SUFFIXES)} file.")
            expanded += files
        elif os.path.exists(path):
            expanded.append(path)
        else:
            matches = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not matches:
                raise HvdlmError(f"data.path {path}: there is no such file, folder or match: check --data.path.")
            expanded += matches
    for source in expanded:
        if source != "embedded" and not os.access(source, os.R_OK):
            raise HvdlmError(f"data.path {source}: this user can't read it: change its permissions or path.")
        if source != "embedded" and not os.path.isfile(source):
            raise HvdlmError(
                f"data.path {source}: not a regular file, and texts are read twice: save it as a file, or pipe it into "
                "--data.path -."
            )
    return expanded


def raw_chunks(source: str, progress: ReadProgress | None = None) -> Iterator[bytes]:
    """Yield the bytes of one source, unpacked, and update ``progress``."""
    progress = progress or ReadProgress()
    if source == "embedded":
        data = embedded().encode()
        progress.hash.update(data)
        progress.bytes_read = len(data)
        yield data
        return
    packed, count = source.endswith(".gz"), 0
    try:
        limit = untrusted_input.unpacked_limit(source) if packed else math.inf
        with open(source, "rb") as on_disk, gzip.open(on_disk) if packed else on_disk as file:
            while chunk := file.read(_CHUNK):
                count += len(chunk)
                if count > limit:
                    raise HvdlmError(
                        f"data.path {source}: unpacks to more than {untrusted_input.RATIO} times its size, as a "
                        "decompression bomb does: if it is a text nevertheless, unpack it with gunzip and give that "
                        "file."
                    )
                progress.hash.update(chunk)
                progress.bytes_read = on_disk.tell()
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {error}.") from error


def text_chunks(
    source: str, form: Form = _FORM, start: SourcePosition = START, progress: ReadProgress | None = None
) -> Iterator[SourceChunk]:
    """Yield the text of one source from ``start`` on, in chunks that end at a line's end, a blank or a record's end.

    The bytes before ``start`` are read too, except for tables, so that ``progress`` has the SHA-256 of all at the end.

    Raises:
        HvdlmError: it can't be read, is not UTF-8, or a record is damaged.
    """
    progress = progress or ReadProgress()
    if documents.is_table(source):
        return documents.rows(source, form, start, progress)
    raw = skip_bytes(raw_chunks(source, progress), start.offset)
    if documents.is_records(source):
        return documents.lines(source, raw, form, start)
    return split_text(source, raw, start.offset, 16 * _CHUNK)


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
    for source in expand(paths):
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
