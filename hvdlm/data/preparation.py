"""Text becomes a token folder: written once by one process, which others wait for, and gone on with where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvdlm.config import DataConfig
from hvdlm.data import sources, splits, tokenizers, workers
from hvdlm.data.documents import Form
from hvdlm.data.prepare_progress import Journal, itemsize
from hvdlm.data.progress import Progress, say
from hvdlm.data.source_chunks import START, Place, Reading
from hvdlm.data.token_files import FORMAT, TokenData, is_prepared, open_tokens
from hvdlm.data.tokenizers import Tokenizer, WordTokenizer
from hvdlm.data.workers import WorkerDied
from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import write_synced
from hvdlm.io.user_folders import user_cache


def prepare(config: DataConfig, output: str | None = None, processes: int | None = None) -> TokenData:
    """Return the tokens of ``config``, from the cache where they are, else tokenized and written there.

    Where that was killed before, it goes on. The result is the same whatever the number of ``processes`` that encode.

    Raises:
        HvdlmError: a source can't be used, or the folder can't be written.
    """
    if is_prepared(config.paths):
        return open_tokens(Path(config.paths[0]))
    config = splits.choose(without_stdin(config))
    check_sources(config)
    folder = Path(output) if output else cache(config) / key(config)
    if output:
        check_free(folder)
    with writing(folder):
        work = Preparation(config, folder)
        if (folder / "header.json").is_file():
            work.journal.discard()  # of one that was killed when its work was done
        else:
            work.run(processes)
    return open_tokens(folder)


def check_free(folder: Path) -> None:
    """Check that ``--output`` may be written.

    Raises:
        HvdlmError: something is there.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HvdlmError(f"--output {folder}: it exists and is no empty folder: name one that doesn't exist yet.")


def without_stdin(config: DataConfig) -> DataConfig:
    """Return ``config`` with standard input kept in a file: it is read twice, and found again when a run resumes."""
    paths, held_out = config.paths, config.validation_paths
    if "-" not in (*paths, *held_out):
        return config
    kept = sources.spool(cache(config))
    paths, held_out = ([kept if path == "-" else path for path in group] for group in (paths, held_out))
    return replace(config, path=paths, validation_path=held_out or None)


def check_sources(config: DataConfig) -> None:
    """Check quickly that every source and the tokenizer are there and readable.

    Raises:
        HvdlmError: one isn't.
    """
    tokenizers.check(config.tokenizer)
    for path in sources.expand([*config.paths, *config.validation_paths]):
        if path != "embedded" and os.path.getsize(path) == 0:
            raise HvdlmError(f"data.path {path}: the file is empty: give a file with text.")


def cache(config: DataConfig) -> Path:
    """Return the folder of prepared token folders."""
    if config.cache:
        return Path(config.cache)
    return user_cache() / "tokens"


def key(*configs: DataConfig) -> str:
    """Return a name for what is made of these texts with these settings."""
    settings: list[Any] = [FORMAT]
    for config in configs:
        settings += [config.tokenizer, config.vocab_size, config.validation_share, config.field, config.separator]
        for group in (config.paths, config.validation_paths):
            settings += [*map(_identity, sources.expand(group)), "|"]
        if os.path.isfile(config.tokenizer):
            settings.append(_identity(config.tokenizer))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def _identity(source: str) -> list[Any]:
    if source == "embedded":
        return [source, hashlib.sha256(sources.embedded().encode()).hexdigest()]
    status = os.stat(source)
    return [os.path.abspath(source), status.st_size, status.st_mtime_ns]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only process that writes ``path``, when those before are done; an OSError becomes a sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / f".{path.name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise HvdlmError(
            f"the token files can't be written to {path}: {error.strerror or error}"
            ": free space or choose another folder (--data.cache FOLDER)."
        ) from error


def train_tokenizer(config: DataConfig, groups: Sequence[tuple[Sequence[str], Form]]) -> Tokenizer:
    """Return the tokenizer of ``config``, trained on the texts of all ``groups`` of paths where it needs training."""
    total = sum(sources.size(source) for paths, _ in groups for source in sources.expand(paths))
    with Progress("training the tokenizer", total) as progress:
        found = (text for paths, form in groups for text in sources.texts(paths, form, progress.advance))
        return tokenizers.train(config.tokenizer, config.vocab_size, found)


class _Label(NamedTuple):
    """Where a text comes from: the number of its source, the place in it where it ends, and how many bytes it has.

    ``read``: bytes of the source as it lies on disk that were read for it.
    """

    source: int
    end: Place
    bytes: int
    read: int


class Preparation:
    """One token folder in the making: its sources in order, those of the validation text last."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._form = Form(config.field, config.separator)
        self._paths, self._held_out = sources.expand(config.paths), sources.expand(config.validation_paths)
        self._sources = self._paths + self._held_out
        self.journal = Journal(folder, key(config), len(self._sources))

    def run(self, processes: int | None) -> None:
        """Write the folder, from where an earlier attempt was."""
        try:
            tokenizer = self._tokenizer()
            self._encode(tokenizer, processes)
            self._finish(tokenizer)
        except WorkerDied:
            self.journal.close()
            raise
        except (HvdlmError, OSError):  # it would fail again
            self.journal.discard()
            raise

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer, of the earlier attempt where there is one."""
        if found := self.journal.find():
            say(f"hvdlm: going on after {self.journal.state.tokens:,} tokens of an earlier prepare")
            return found
        groups = [(paths, self._form) for paths in (self._paths, self._held_out) if paths]
        tokenizer = train_tokenizer(self._config, groups)
        self.journal.begin(tokenizer)
        return tokenizer

    def _encode(self, tokenizer: Tokenizer, processes: int | None) -> None:
        sizes, state = [sources.size(source) for source in self._sources], self.journal.state
        self.journal.open(tokenizer)
        count = workers.choose(processes, tokenizer, sum(sizes))
        with Progress("encoding", sum(sizes), sum(sizes[: state.source]), state.tokens) as progress:
            for label, ids in workers.encoded(tokenizer, self._labelled(), count):
                self.journal.add(label.source, label.end, ids, label.bytes)
                progress.advance(label.read, state.tokens)

    def _labelled(self) -> Iterator[tuple[str, _Label]]:
        """Yield every text that is still to be encoded; a source's digest is known when the next one begins."""
        begun, place = self.journal.state.source, self.journal.state.place
        for number, source in enumerate(self._sources[begun:], begun):
            reading, before = Reading(), 0
            for text, end in sources.pieces(source, self._form, place, reading):
                yield text, _Label(number, end, len(text.encode()), reading.done - before)
                before = reading.done
            self.journal.state.digests.append(sources.digest(source, reading))
            place = START

    def _finish(self, tokenizer: Tokenizer) -> None:
        """Write the header, and give the folder its name."""
        places = self.journal.finish()
        edge = int(np.searchsorted(places[:, 0], len(self._paths)))  # pieces of the training text
        for pieces, paths in ((edge, self._paths), (len(places) - edge, self._held_out)):
            if paths and not pieces:
                raise sources.no_text(paths)
        (tokens, size), train = places[-1, 1:].tolist(), int(places[edge - 1, 1])
        if self._held_out:
            before = int(places[edge - 1, 2])
        else:
            train = int(tokens * (1 - self._config.validation_share))
            before = self._bytes_before(tokenizer, places, train)
        header = {
            "format": FORMAT,
            "dtype": f"uint{8 * itemsize(tokenizer)}",
            "train": train,
            "validation": tokens - train,
            # Words decode to one blank between them and <unk>: bits per byte of the text are not defined.
            "validation_bytes": 0 if isinstance(tokenizer, WordTokenizer) else size - before,
            "tokenizer": tokenizer.hash,
            "sources": dict(zip(self._sources, self.journal.state.digests, strict=True)),
        }
        write_synced(self.journal.tokens / "header.json", json.dumps(header, indent=1).encode())
        self.journal.put_in_place(self._folder)

    def _bytes_before(self, tokenizer: Tokenizer, places: np.ndarray, count: int) -> int:
        """Return of how many bytes of text the first ``count`` tokens are made."""
        index = int(np.searchsorted(places[:, 1], count, "right"))
        _, first, size = places[index - 1].tolist() if index else (0, 0, 0)
        dtype = np.dtype(f"<u{itemsize(tokenizer)}")
        ids = np.fromfile(self.journal.tokens / "tokens.bin", dtype, count - first, offset=first * dtype.itemsize)
        return size + len(tokenizer.decode(ids.tolist()).encode())
