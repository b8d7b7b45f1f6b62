"""Text from files, records, folders, globs, gzip, standard input or the embedded corpus, in bounded memory."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvdlm import untrusted
from hvdlm.data import documents
from hvdlm.data.documents import Form
from hvdlm.disk import sha256
from hvdlm.interfaces import HvdlmError

_CHUNK = 1 << 20
_SUFFIXES = (".txt", ".md", ".text", ".gz", *documents.SUFFIXES)
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
            documents.check_folder(Path(path))
            files = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES))
            if not files:
                raise HvdlmError(f"data.path {path}: the folder holds no {', '.join(_SUFFIXES)} file.")
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


def chunks(source: str) -> Iterator[bytes]:
    """Yield the bytes of one source."""
    if source == "embedded":
        yield embedded().encode()
        return
    packed, done = source.endswith(".gz"), 0
    try:
        limit = untrusted.unpacked_limit(source) if packed else math.inf
        with gzip.open(source) if packed else open(source, "rb") as file:
            while chunk := file.read(_CHUNK):
                done += len(chunk)
                if done > limit:
                    raise HvdlmError(
                        f"data.path {source}: unpacks to more than {untrusted.RATIO} times its size, as a "
                        "decompression bomb does: if it is a text all the same, unpack it with gunzip and give "
                        "that file."
                    )
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {error}.") from error


def texts(paths: Sequence[str], digests: dict[str, str] | None = None, form: Form = _FORM) -> Iterator[str]:
    """Yield the text of all sources in pieces of about a megabyte that end at a line's end, or at a blank.

    Of records, ``form`` tells what their text is; pieces end where a record does. Memory doesn't grow with the corpus.
    ``digests`` takes the SHA-256 of every source as it lies on disk, unpacked.

    Raises:
        HvdlmError: a source can't be read or is not UTF-8, or there is no text at all.
    """
    empty = True
    for source in expand(paths):
        hashed = hashlib.sha256()
        found = _pieces(_decoded(source, hashed))
        if documents.is_records(source):
            found = documents.texts(source, _hashed(source, hashed), form)
        for piece in found:
            empty = False
            yield piece
        if digests is not None:
            # A table is read in another order than it lies there.
            digests[source] = sha256(Path(source)) if documents.is_table(source) else hashed.hexdigest()
    if empty:
        raise HvdlmError(f"data.path {', '.join(paths)}: the corpus is empty: give a file with text.")


def _hashed(source: str, hashed: Any) -> Iterator[bytes]:
    for chunk in chunks(source):
        hashed.update(chunk)
        yield chunk


def _decoded(source: str, hashed: Any) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        for chunk in _hashed(source, hashed):
            pending = len(decoder.getstate()[0])
            yield decoder.decode(chunk)
            done += len(chunk)
        pending = 0
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise HvdlmError(
            f"data.path {source}: byte {done - pending + error.start} is not UTF-8: convert it, for example with "
            "iconv -t UTF-8."
        ) from error


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Cut where a word can't be torn apart; a word longer than any language's is cut all the same."""
    rest = ""
    for text in texts:
        rest += text
        cut = rest.rfind("\n") + 1 or rest.rfind(" ") + 1 or (len(rest) if len(rest) > 16 * _CHUNK else 0)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


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
