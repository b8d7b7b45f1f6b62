"""The progress of ``prepare`` on disk: killed at any moment, the same command resumes from there.

The folder ``.NAME.partial`` beside the token folder NAME holds ``tokens/``, which is renamed to NAME when it is whole,
``places.bin`` with a row for every chunk, and ``journal.json``, which says how much of both is valid: it is written
when that much is on disk, and anything beyond is cut off on resuming.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hvdlm.data import tokenizers
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, safe_files, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora.passages import EncodedPassage
from hvdlm_corpora.source_chunks import START, SourcePosition

_FORMAT = "hvdlm-prepare-2"
_LIMIT = 1 << 28  # bytes: room for the digests of millions of sources
_COUNT = 1 << 53  # JSON readers keep integers exact up to here
_SAVE_SECONDS = 5.0  # of work that are lost at most
_TOKEN_FILES = r"header\.json|tokens\.bin|documents\.bin|targets\.bin|tokenizer\.json"
_TOKEN_FILES += r"|chat_template\.jinja|tokenizer_config\.json"
_FILES = r"journal\.json|places\.bin|\.journal\.json\.[0-9a-f]+\.partial|\.journal\.json\.partial"
_START = np.dtype("<i8")  # of a document: the tokens before it
_ROW = np.dtype(("<u8", 4))  # of a chunk: the number of its source; tokens, bytes of text and documents up to its end


@dataclass
class JournalState:
    """The valid progress on disk; the names of its fields are those of journal.json.

    Attributes:
        source: number of the source that is being read.
        offset: see ``SourcePosition``.
        number: see ``SourcePosition``.
        pieces: chunks of all sources.
        tokens: tokens of all sources.
        bytes: bytes of text of all sources.
        documents: documents of all sources in the index; 0 where there is none.
        digests: of the sources before ``source``, and perhaps of some after it.
    """

    source: int = 0
    offset: int = 0
    number: int = 0
    pieces: int = 0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    digests: list[str] = field(default_factory=list)

    @property
    def position(self) -> SourcePosition:
        """Where reading of the source resumes."""
        return SourcePosition(self.offset, self.number)


class Journal:
    """The partial folder of a token folder.

    Args:
        folder: the token folder.
        identity: a hash of the sources and the settings.
        sources: the number of sources.
        marked: whether there is a file of which tokens are targets.

    Attributes:
        tokens: the folder that becomes the token folder.
        state: the progress so far.
    """

    def __init__(self, folder: Path, identity: str, sources: int, marked: bool = False) -> None:
        self._folder = partial(folder)
        self._marked = marked
        self._identity = identity
        self._sources = sources
        self.tokens = self._folder / "tokens"
        self.state = JournalState()
        self._files: list[BinaryIO] = []

    def resume(self) -> Tokenizer | None:
        """Read the ``state`` of earlier work and return its tokenizer; None where there is none.

        Work on other sources, with other settings, or that is damaged, is deleted.
        """
        try:
            return self._read()
        except (ValueError, OSError, RecursionError, HvdlmError):
            self.state = JournalState()
            self._delete()
            return None

    def _read(self) -> Tokenizer:
        if {safe_files.kind(path) for path in (self._folder, self.tokens)} != {"folder"}:
            raise ValueError("it is a link")
        journal = untrusted_input.read_json(self._folder / "journal.json", _LIMIT, self._folder)
        state = _parse_state(journal)
        if journal.get("identity") != self._identity:
            raise ValueError("it is of other sources or settings")
        path = self.tokens / "tokenizer.json"
        tokenizer = tokenizers.read(path, self._folder)
        sizes = {"places.bin": state.pieces * _ROW.itemsize, "tokens/tokens.bin": state.tokens * itemsize(tokenizer)}
        if state.documents:
            sizes["tokens/documents.bin"] = state.documents * _START.itemsize
        if self._marked:
            sizes["tokens/targets.bin"] = state.tokens
        for name, size in sizes.items():
            if untrusted_input.size(self._folder / name, within=self._folder) < size:
                raise ValueError(f"{name} is too short")
        if tokenizer.hash != journal.get("tokenizer"):
            raise ValueError("the tokenizer is another one")
        self._check(state)
        self.state = state
        return tokenizer

    def _check(self, state: JournalState) -> None:
        """Check that places.bin agrees with the journal."""
        rows = np.fromfile(self._folder / "places.bin", _ROW, state.pieces).astype(np.int64)
        last = [state.source, state.tokens, state.bytes, state.documents]
        if state.source >= self._sources or (np.diff(rows, axis=0) < 0).any() or rows.min(initial=0) < 0:
            raise ValueError("places.bin is damaged")
        if (rows[-1].tolist() if len(rows) else [0, 0, 0, 0]) != last or (not len(rows) and state.position != START):
            raise ValueError("places.bin is of another journal")

    def begin(self, tokenizer: Tokenizer, beside: Mapping[str, str]) -> None:
        """Start from scratch with a trained tokenizer, and the content of the files ``beside`` it, by their names."""
        self.tokens.mkdir(parents=True)
        for name, content in beside.items():
            atomic_files.write_synced(self.tokens / name, content.encode())
        atomic_files.write_synced(self.tokens / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        for name in ("places.bin", "tokens/tokens.bin", *(("tokens/targets.bin",) if self._marked else ())):
            safe_files.create(self._folder / name).close()

    def open(self, tokenizer: Tokenizer, indexed: bool = False) -> None:
        """Open the files for writing after the valid progress, and cut off what follows it.

        ``indexed``: whether there is an index of documents.
        """
        self._hash = tokenizer.hash
        self._dtype = f"<u{itemsize(tokenizer)}"
        sizes = {"places.bin": _ROW.itemsize * self.state.pieces, "tokens/tokens.bin": self._size()}
        if indexed:
            sizes["tokens/documents.bin"] = _START.itemsize * self.state.documents
            if safe_files.kind(self.tokens / "documents.bin") is None:
                safe_files.create(self.tokens / "documents.bin").close()
        if self._marked:
            sizes["tokens/targets.bin"] = self.state.tokens
        for name, size in sizes.items():
            file = os.fdopen(safe_files.open_regular(self._folder / name, os.O_RDWR), "r+b")
            self._files.append(file)
            file.truncate(size)
            file.seek(size)
        self._save()

    def _size(self) -> int:
        return self.state.tokens * np.dtype(self._dtype).itemsize

    def add(self, source: int, end: SourcePosition, encoded: EncodedPassage, count: int) -> None:
        """Write the ids of a chunk of ``source`` that has ``count`` bytes and ends at ``end``."""
        state, (places, tokens, *others) = self.state, self._files
        if encoded.targets is not None:
            others.pop().write(encoded.targets.tobytes())
        for file in others:
            file.write((encoded.starts + state.tokens).astype(_START).tobytes())
            state.documents += len(encoded.starts)
        state.source = source
        state.offset, state.number = end
        state.pieces += 1
        state.tokens += len(encoded.ids)
        state.bytes += count
        tokens.write(encoded.ids.astype(self._dtype).tobytes())
        places.write(np.array([source, state.tokens, state.bytes, state.documents], "<u8").tobytes())
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        for file in self._files:
            atomic_files.sync(file)
        journal = {"format": _FORMAT, "identity": self._identity, "tokenizer": self._hash, **asdict(self.state)}
        journal["digests"] = self.state.digests[: self.state.source]
        atomic_files.replace(self._folder / "journal.json", json.dumps(journal))
        atomic_files.sync_folder(self._folder)
        self._saved = time.monotonic()

    def finish(self) -> np.ndarray:
        """Save and close; return the content of ``places.bin``, ``[chunks, 4]``."""
        self._save()
        self.close()
        return np.fromfile(self._folder / "places.bin", _ROW)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()

    def publish(self, folder: Path) -> None:
        """Rename the whole token folder to its final name."""
        atomic_files.sync_folder(self.tokens)
        safe_files.delete_owned(folder, _TOKEN_FILES)  # of a token folder without its header
        self.tokens.rename(folder)  # fails where it holds anything else
        atomic_files.sync_folder(folder.parent)
        self.discard()

    def discard(self) -> None:
        """Delete the partial folder.

        Raises:
            OSError: it can't be deleted, or holds what hvdlm did not write.
        """
        self.close()
        self._delete()

    def _delete(self) -> None:
        for path in (self._folder, self.tokens):
            if safe_files.kind(path) == "symbolic link":
                safe_files.delete_file(path)
        safe_files.delete_owned(self.tokens, _TOKEN_FILES)
        safe_files.delete_owned(self._folder, _FILES)
        if safe_files.kind(self._folder) is not None:
            raise OSError(errno.ENOTEMPTY, "it holds files that hvdlm did not write: move them", str(self._folder))


def partial(folder: Path) -> Path:
    """Return the folder of a token folder's work until that is whole."""
    return folder.parent / f".{folder.name}.partial"


def itemsize(tokenizer: Tokenizer) -> int:
    """Return the bytes of an id on disk."""
    return 2 if tokenizer.vocab <= 1 << 16 else 4


def _parse_state(journal: Any) -> JournalState:
    """Return the state in a journal, which is untrusted, after checking the types of all fields that are used."""
    if not isinstance(journal, dict) or journal.get("format") != _FORMAT:
        raise ValueError("it is no journal")
    names = ("source", "offset", "number", "pieces", "tokens", "bytes", "documents")
    counts: dict[str, Any] = {name: journal.get(name) for name in names}
    digests = journal.get("digests")
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < _COUNT:
            raise ValueError(f"its {name} is {shown(repr(value))}")
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise ValueError(f"its digests are {shown(repr(digests))}")
    if len(digests) != counts["source"]:
        raise ValueError("its digests are not those of the sources before")
    return JournalState(**counts, digests=digests)
