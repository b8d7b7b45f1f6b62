"""Text from files, records, folders, globs, gzip, standard input or the embedded corpus, in bounded memory."""

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
from hvdlm.data.source_chunks import START, Piece, Place, Reading, behind, cut
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256

_CHUNK = 1 << 20
SUFFIXES = (".txt", ".md", ".text", ".gz", *documents.SUFFIXES)
_FORM = Form()


def embedded() -> str:
    """Return the prose of the Python language reference that ships with every Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def expand(paths: Sequence[str]) -> list[str]:
    """Return every source that ``paths`` name: files in order, "embedded" and "-" as they are.

    Raises:
        HvdlmError: one names nothing readable.
    """
    found: list[str] = []
    for path in paths:
        if path == "embedded":
            found.append(path)
        elif os.path.isdir(path):
            if not os.access(path, os.R_OK | os.X_OK):
                raise HvdlmError(f"data.path {path}: this user can't read it: change its permissions or path.")
            splits.check_one(Path(path))
            left_out = splits.strays(Path(path))
            files = sorted(
                str(p) for p in Path(path).rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and p not in left_out
            )
            if not files:
                raise HvdlmError(f"data.path {path}: the folder holds no {', '.join(SUFFIXES)} file.")
            found += files
        elif os.path.exists(path):
            found.append(path)
        else:
            matches = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not matches:
                raise HvdlmError(f"data.path {path}: there is no such file, folder or match: check --data.path.")
            found += matches
    for source in found:
        if source != "embedded" and not os.access(source, os.R_OK):
            raise HvdlmError(f"data.path {source}: this user can't read it: change its permissions or path.")
        if source != "embedded" and not os.path.isfile(source):
            raise HvdlmError(
                f"data.path {source}: is no regular file, and texts are read twice: save it as a file, or pipe it into "
                "--data.path -."
            )
    return found


def chunks(source: str, reading: Reading | None = None) -> Iterator[bytes]:
    """Yield the bytes of one source, unpacked; ``reading`` hears of them."""
    reading = reading or Reading()
    if source == "embedded":
        data = embedded().encode()
        reading.hashed.update(data)
        reading.done = len(data)
        yield data
        return
    packed, count = source.endswith(".gz"), 0
    try:
        limit = untrusted_input.unpacked_limit(source) if packed else math.inf
        with open(source, "rb") as lying, gzip.open(lying) if packed else lying as file:
            while chunk := file.read(_CHUNK):
                count += len(chunk)
                if count > limit:
                    raise HvdlmError(
                        f"data.path {source}: unpacks to more than {untrusted_input.RATIO} times its size, as a "
                        "decompression bomb does: if it is a text all the same, unpack it with gunzip and give "
                        "that file."
                    )
                reading.hashed.update(chunk)
                reading.done = lying.tell()
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {error}.") from error


def pieces(source: str, form: Form = _FORM, place: Place = START, reading: Reading | None = None) -> Iterator[Piece]:
    """Yield the text of one source from ``place`` on, in pieces that end at a line's end or a blank, or with a record.

    What comes before ``place`` is read too, unless it is a table, so that ``reading`` knows its SHA-256 at the end.

    Raises:
        HvdlmError: it can't be read, is not UTF-8, or a record is damaged.
    """
    reading = reading or Reading()
    if documents.is_table(source):
        return documents.rows(source, form, place, reading)
    found = behind(chunks(source, reading), place.offset)
    if documents.is_records(source):
        return documents.lines(source, found, form, place)
    return cut(source, found, place.offset, 16 * _CHUNK)


def digest(source: str, reading: Reading) -> str:
    """Return the SHA-256 of a source that has been read to its end, as it lies on disk, unpacked."""
    # A table is read in another order than it lies there.
    return sha256(Path(source)) if documents.is_table(source) else reading.hashed.hexdigest()


def size(source: str) -> int:
    """Return the bytes of a source as it lies on disk."""
    return len(embedded().encode()) if source == "embedded" else os.path.getsize(source)


def texts(paths: Sequence[str], form: Form = _FORM, heard: Callable[[int], object] | None = None) -> Iterator[str]:
    """Yield the text of all sources in ``pieces``. Memory doesn't grow with the corpus.

    ``heard`` is told after every piece how many bytes on disk were read for it.

    Raises:
        HvdlmError: a source can't be read or is not UTF-8, or there is no text at all.
    """
    empty = True
    for source in expand(paths):
        reading, before = Reading(), 0
        for piece in pieces(source, form, reading=reading):
            empty = False
            yield piece.text
            if heard:
                heard(reading.done - before)
            before = reading.done
    if empty:
        raise no_text(paths)


def no_text(paths: Sequence[str]) -> HvdlmError:
    """Return what is said where there is no text at all."""
    return HvdlmError(f"data.path {', '.join(paths)}: the corpus is empty: give a file with text.")


def spool(folder: Path) -> str:
    """Copy standard input to a file in ``folder``, named by its content, and return its path.

    Raises:
        HvdlmError: there is nothing on it, or the folder can't be written.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise HvdlmError("data.path -: standard input is a terminal: pipe a text into it, or give a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return str(_kept(folder))
    except OSError as error:
        raise HvdlmError(
            f"data.path -: standard input can't be kept in {folder}: {error.strerror}: free space or choose another "
            "folder (--data.cache FOLDER)."
        ) from error


def _kept(folder: Path) -> Path:
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
        finally:  # of an endless input nothing stays but the sentence
            Path(file.name).unlink(missing_ok=True)
    return path
