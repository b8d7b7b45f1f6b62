"""How far a ``prepare`` has come, on disk: killed at any moment, the same command goes on from there.

The folder ``.NAME.partial`` beside the token folder NAME holds ``tokens/``, which takes that name when it is whole,
``places.bin`` with a row for every piece, and ``journal.json``, which says how much of both counts: it is written when
that much is on disk, and what lies behind it is cut off when the work goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hvdlm.data import tokenizers
from hvdlm.data.source_chunks import START, Place
from hvdlm.data.tokenizers import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, untrusted_input
from hvdlm.io.untrusted_input import shown

_FORMAT = "hvdlm-prepare-1"
_LIMIT = 1 << 28  # bytes: a digest for each of millions of sources
_COUNT = 1 << 53
_EVERY = 5.0  # seconds of work that are lost at most
_ROW = np.dtype(("<u8", 3))  # of a piece: the number of its source; tokens and bytes of text at its end


@dataclass
class State:
    """What is on disk.

    ``source``: the number of the source that is read; ``offset`` and ``number``: where in it; ``pieces``, ``tokens``
    and ``bytes`` (of text) of all sources together; ``digests`` of the sources before, and perhaps of some behind.
    """

    source: int = 0
    offset: int = 0
    number: int = 0
    pieces: int = 0
    tokens: int = 0
    bytes: int = 0
    digests: list[str] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Where in its source reading goes on."""
        return Place(self.offset, self.number)


class Journal:
    """The partial folder of a token folder made of so many ``sources``; ``identity`` tells of them and the settings."""

    def __init__(self, folder: Path, identity: str, sources: int) -> None:
        self._folder, self._identity, self._sources = partial(folder), identity, sources
        self.tokens, self.state = self._folder / "tokens", State()
        self._files: list[BinaryIO] = []

    def find(self) -> Tokenizer | None:
        """Return the tokenizer of the work that was begun here, ``state`` being how far it came; None: it begins anew.

        Work on other sources, with other settings, or that is damaged, is thrown away.
        """
        try:
            return self._found()
        except (ValueError, OSError, RecursionError, HvdlmError):
            self.state = State()
            if self._folder.is_symlink():
                self._folder.unlink()
            shutil.rmtree(self._folder, ignore_errors=True)
            return None

    def _found(self) -> Tokenizer:
        untrusted_input.inside(self._folder, self._folder.parent)
        said = untrusted_input.read_json(self._folder / "journal.json", _LIMIT, self._folder)
        state = _state(said)
        if said.get("identity") != self._identity:
            raise ValueError("it is of other sources or settings")
        path = self.tokens / "tokenizer.json"
        tokenizer = tokenizers.read(path, self._folder)
        sizes = {"places.bin": state.pieces * _ROW.itemsize, "tokens/tokens.bin": state.tokens * itemsize(tokenizer)}
        for name, size in sizes.items():
            if untrusted_input.size(self._folder / name, within=self._folder) < size:
                raise ValueError(f"{name} is too short")
        if tokenizer.hash != said.get("tokenizer"):
            raise ValueError("the tokenizer is another one")
        self._check(state)
        self.state = state
        return tokenizer

    def _check(self, state: State) -> None:
        """Check that the pieces on disk are those that the journal tells of."""
        rows = np.fromfile(self._folder / "places.bin", _ROW, state.pieces).astype(np.int64)
        last = [state.source, state.tokens, state.bytes]
        if state.source >= self._sources or (np.diff(rows, axis=0) < 0).any() or rows.min(initial=0) < 0:
            raise ValueError("places.bin is damaged")
        if (rows[-1].tolist() if len(rows) else [0, 0, 0]) != last or (not len(rows) and state.place != START):
            raise ValueError("places.bin is of another journal")

    def begin(self, tokenizer: Tokenizer) -> None:
        """Begin anew, with a tokenizer that is ready."""
        self.tokens.mkdir(parents=True)
        atomic_files.write_synced(self.tokens / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())
        for name in ("places.bin", "tokens/tokens.bin"):
            (self._folder / name).touch()

    def open(self, tokenizer: Tokenizer) -> None:
        """Open both files where the work goes on."""
        self._hash, self._dtype = tokenizer.hash, f"<u{itemsize(tokenizer)}"
        for name, size in (("places.bin", _ROW.itemsize * self.state.pieces), ("tokens/tokens.bin", self._size())):
            file = (self._folder / name).open("r+b")
            self._files.append(file)
            file.truncate(size)
            file.seek(size)
        self._save()

    def _size(self) -> int:
        return self.state.tokens * np.dtype(self._dtype).itemsize

    def add(self, source: int, end: Place, ids: np.ndarray, count: int) -> None:
        """Write a piece of ``source``, made of ``count`` bytes."""
        state, (places, tokens) = self.state, self._files
        state.source, (state.offset, state.number) = source, end
        state.pieces, state.tokens, state.bytes = state.pieces + 1, state.tokens + len(ids), state.bytes + count
        tokens.write(ids.astype(self._dtype).tobytes())
        places.write(np.array([source, state.tokens, state.bytes], "<u8").tobytes())
        if time.monotonic() - self._saved >= _EVERY:
            self._save()

    def _save(self) -> None:
        for file in self._files:
            atomic_files.sync(file)
        said = {"format": _FORMAT, "identity": self._identity, "tokenizer": self._hash, **asdict(self.state)}
        said["digests"] = self.state.digests[: self.state.source]
        atomic_files.replace(self._folder / "journal.json", json.dumps(said))
        atomic_files.sync_folder(self._folder)
        self._saved = time.monotonic()

    def finish(self) -> np.ndarray:
        """Save for the last time; return what ``places.bin`` holds, ``[pieces, 3]``."""
        self._save()
        self.close()
        return np.fromfile(self._folder / "places.bin", _ROW)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()

    def put_in_place(self, folder: Path) -> None:
        """Give the whole token folder its name."""
        atomic_files.sync_folder(self.tokens)
        shutil.rmtree(folder, ignore_errors=True)
        self.tokens.rename(folder)
        atomic_files.sync_folder(folder.parent)
        self.discard()

    def discard(self) -> None:
        """Delete what there is of the work."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def partial(folder: Path) -> Path:
    """Return where the work on a token folder lies until that is whole."""
    return folder.parent / f".{folder.name}.partial"


def itemsize(tokenizer: Tokenizer) -> int:
    """Return the bytes of an id on disk."""
    return 2 if tokenizer.vocab <= 1 << 16 else 4


def _state(said: Any) -> State:
    """Return the state that a journal tells of; what is used of it is of the types that ``_save`` gives it."""
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise ValueError("it is no journal")
    names = ("source", "offset", "number", "pieces", "tokens", "bytes")
    counts: dict[str, Any] = {name: said.get(name) for name in names}
    digests = said.get("digests")
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < _COUNT:
            raise ValueError(f"its {name} is {shown(repr(value))}")
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise ValueError(f"its digests are {shown(repr(digests))}")
    if len(digests) != counts["source"]:
        raise ValueError("its digests are not those of the sources before")
    return State(**counts, digests=digests)
