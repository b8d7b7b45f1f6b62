"""Text from files, folders, globs, gzip, standard input or the embedded corpus, in bounded memory."""

from __future__ import annotations

import glob
import gzip
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvdlm.interfaces import HvdlmError

_CHUNK = 1 << 20
_SUFFIXES = (".txt", ".md", ".text", ".gz")


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
        if path in ("embedded", "-"):
            found.append(path)
        elif os.path.isdir(path):
            files = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
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
        if source not in ("embedded", "-") and not os.access(source, os.R_OK):
            raise HvdlmError(f"data.path {source}: this user can't read it: change its permissions or path.")
    return found


def chunks(source: str) -> Iterator[bytes]:
    """Yield the bytes of one source."""
    if source == "embedded":
        yield embedded().encode()
        return
    try:
        with (
            sys.stdin.buffer
            if source == "-"
            else gzip.open(source)
            if source.endswith(".gz")
            else open(source, "rb") as f
        ):
            while chunk := f.read(_CHUNK):
                yield chunk
    except (OSError, EOFError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {error}.") from error


def read(paths: Sequence[str]) -> str:
    """Return the text of all sources."""
    texts = []
    for source in expand(paths):
        data = b"".join(chunks(source))
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise HvdlmError(
                f"data.path {source}: byte {error.start} is not UTF-8: convert it, for example with iconv -t UTF-8."
            ) from error
    text = "".join(texts)
    if not text:
        raise HvdlmError(f"data.path {', '.join(paths)}: the corpus is empty: give a file with text.")
    return text
