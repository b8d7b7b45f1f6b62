"""Prepares token folders from text: one process writes, others wait, and an interrupted preparation is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvdlm.config import DataConfig
from hvdlm.data.token_files import FORMAT, INDEXED_FORMAT, MARKED_FORMAT, TokenData, is_prepared, open_tokens
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files
from hvdlm.io.atomic_files import write_synced
from hvdlm.io.text_decoding import without_surrogates
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import (
    cache,
    conversations,
    document_tokens,
    documents,
    hub_data,
    passages,
    sources,
    splits,
    token_corpus,
    tokenizers,
    workers,
)
from hvdlm_corpora.documents import Form
from hvdlm_corpora.passages import Passage, SpecialTokens
from hvdlm_corpora.prepare_progress import Journal, itemsize
from hvdlm_corpora.progress_bar import ProgressBar, note, print_line
from hvdlm_corpora.source_chunks import START, ReadProgress, SourcePosition
from hvdlm_corpora.time_limit import TooSlow
from hvdlm_corpora.tokenizers import WordTokenizer
from hvdlm_corpora.workers import WorkerDied
from hvdlm_corpora.write_lock import writing


def prepare(config: DataConfig, output: str | None = None, processes: int | None = None) -> TokenData:
    """Return the tokens of ``config``, from the cache, or else tokenized and written there.

    Interrupted work is resumed. The result doesn't depend on the number of ``processes`` that encode.

    Raises:
        HvdlmError: a source can't be used, or the folder can't be written.
    """
    config = hub_data.local(config)
    if is_prepared(config.paths):
        data = open_tokens(Path(config.paths[0]))
        if config.marks_targets and data.train_targets is None:
            raise HvdlmError(
                f"data.{config.marking_option}: all tokens of the folder {data.folder} are targets: leave it out, or "
                "prepare the records with it."
            )
        return data
    if token_corpus.is_tokens(config.paths):
        if output:
            raise HvdlmError(
                f"--output {output}: data.path {config.paths[0]} holds tokens already, which training reads as they "
                "are: leave --output out."
            )
        return token_corpus.open_files(config)
    config = splits.choose(without_stdin(config))
    check_sources(config)
    folder = Path(output) if output else cache.folder(config) / cache.key(config)
    if output:
        check_free(folder)
    with writing(folder, wait=not output):
        work = Preparation(config, folder)
        if (folder / "header.json").is_file():
            work.journal.discard()  # left behind by a process that was killed after publishing
        else:
            work.run(processes)
    return open_tokens(folder)


def check_free(folder: Path) -> None:
    """Check that ``--output`` may be written.

    Raises:
        HvdlmError: it exists and isn't an empty folder.
    """
    safe_files.check_output(folder, folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise HvdlmError(f"--output {folder}: it exists and is not an empty folder: name one that doesn't exist yet.")


def without_stdin(config: DataConfig) -> DataConfig:
    """Return ``config`` with standard input saved to a file: it is read twice, and again when a run is resumed."""
    paths, held_out = config.paths, config.validation_paths
    if "-" not in (*paths, *held_out):
        return config
    saved = sources.spool(cache.folder(config))
    paths, held_out = ([saved if path == "-" else path for path in group] for group in (paths, held_out))
    return replace(config, path=paths, validation_path=held_out or None)


def form_of(config: DataConfig) -> Form:
    """Return how the texts of ``config`` are read."""
    if config.chat is not None:  # a template writes what ends a conversation, too
        chat = conversations.ChatWriter(conversations.find(config))
        return Form(config.chat, "", config.max_expansion, None, chat)
    return Form(config.field, without_surrogates(config.separator), config.max_expansion, config.prompt)


def special_of(config: DataConfig) -> SpecialTokens:
    """Return how the texts of ``config`` get special tokens."""
    return SpecialTokens(
        form_of(config).separator,
        config.add_special_tokens and config.chat is None,
        config.split_special_tokens and config.chat is None,
        align=config.by_document,
    )


def check_sources(config: DataConfig) -> None:
    """Check quickly that every source and the tokenizer exist and are readable.

    Raises:
        HvdlmError: one doesn't or isn't.
    """
    tokenizers.check(config.tokenizer)
    for path in sources.expand([*config.paths, *config.validation_paths], config.record_field):
        if path != "embedded" and os.path.getsize(path) == 0:
            raise HvdlmError(f"data.path {path}: the file is empty: give a file with text.")
        if config.marks_targets and not documents.kind(path):
            raise HvdlmError(
                f"data.path {path}: it is a text, and data.{config.marking_option} names a field of records: give JSON "
                "lines, a JSON array, CSV or a table, or leave it out."
            )


def train_tokenizer(config: DataConfig, groups: Sequence[tuple[Sequence[str], Form]]) -> Tokenizer:
    """Return the tokenizer of ``config``, trained on the texts of all ``groups`` of paths where it needs training."""
    total = sum(sources.size(source) for paths, form in groups for source in sources.expand(paths, form.field))
    with ProgressBar("training the tokenizer", total) as progress:
        texts = (text for paths, form in groups for text in sources.texts(paths, form, progress.advance))
        return tokenizers.train(config.tokenizer, config.vocab_size, texts)


def _report_spelling(source: str, token: str) -> None:
    note(
        f"{source} spells the special token {shown(token)}, which is read as plain text: "
        "--data.split_special_tokens false reads such spellings as tokens"
    )


class _Label(NamedTuple):
    """The origin of a text.

    Attributes:
        source: number of its source.
        end: position of its end in the source.
        bytes: bytes of the text.
        bytes_read: bytes on disk that were read for it.
    """

    source: int
    end: SourcePosition
    bytes: int
    bytes_read: int


class Preparation:
    """The preparation of one token folder from its sources in order, those of the validation text last."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._form = form_of(config)
        self._special = special_of(config)
        self._paths = sources.expand(config.paths, config.record_field)
        self._validation_paths = sources.expand(config.validation_paths, config.record_field)
        self._sources = self._paths + self._validation_paths
        self.journal = Journal(folder, cache.key(config), len(self._sources), config.marks_targets)

    def run(self, processes: int | None) -> None:
        """Write the folder, resuming earlier work."""
        try:
            tokenizer = self._tokenizer()
            begin, end = document_tokens.find(self._config, tokenizer)
            self._special = replace(self._special, begin=begin, end=end)
            self._encode(tokenizer, processes)
            self._finish(tokenizer)
        except WorkerDied:
            self.journal.close()
            raise
        except (HvdlmError, OSError):  # resuming would fail again
            self.journal.discard()
            raise
        finally:
            conversations.close()

    def _tokenizer(self) -> Tokenizer:
        """Return the tokenizer: that of earlier work, or a new one."""
        if resumed := self.journal.resume():
            print_line(f"hvdlm: resuming after {self.journal.state.tokens:,} tokens of an earlier prepare")
            return resumed
        groups = [(paths, self._form) for paths in (self._paths, self._validation_paths) if paths]
        tokenizer = train_tokenizer(self._config, groups)
        marked = self._config.chat is not None
        self.journal.begin(tokenizer, conversations.files_of(conversations.find(self._config)) if marked else {})
        return tokenizer

    def _encode(self, tokenizer: Tokenizer, processes: int | None) -> None:
        sizes, state = [sources.size(source) for source in self._sources], self.journal.state
        self.journal.open(tokenizer, passages.begins_documents(tokenizer, self._special))
        count = workers.choose(processes, tokenizer, sum(sizes))
        with ProgressBar("encoding", sum(sizes), sum(sizes[: state.source]), state.tokens) as progress:
            try:
                for label, encoded in workers.encoded(tokenizer, self._labelled(tokenizer), count):
                    self.journal.add(label.source, label.end, encoded, label.bytes)
                    progress.advance(label.bytes_read, state.tokens)
            except TooSlow as error:
                end = error.label.end
                where = f"record {end.number:,}" if end.number else f"byte {end.offset:,}"
                raise HvdlmError(f"data.path {self._sources[error.label.source]}, before {where}: {error}") from error

    def _labelled(self, tokenizer: Tokenizer) -> Iterator[tuple[Passage, _Label]]:
        """Yield every text that is still to be encoded; add each source's digest to the journal at its end."""
        first, start = self.journal.state.source, self.journal.state.position
        special = passages.spelled(tokenizer, self._special)
        for number, source in enumerate(self._sources[first:], first):
            progress, before = ReadProgress(), 0
            chunks = sources.text_chunks(source, self._form, start, progress)
            numbered = ((chunk, progress.bytes_read) for chunk in chunks)
            for passage, end, bytes_read in passages.passages(numbered, start == START, self._special):
                if special and (spelled := special.search(passage.text)):
                    _report_spelling(source, spelled[0])
                    special = None  # once is enough
                yield passage, _Label(number, end, len(passage.text.encode()), bytes_read - before)
                before = bytes_read
            self.journal.state.digests.append(sources.digest(source, progress))
            start = START
            for sentence in progress.left_out(" and ".join(self._form.fields)):
                note(f"data.path {source}: {sentence}")

    def _finish(self, tokenizer: Tokenizer) -> None:
        """Write the header, and rename the folder to its final name."""
        chunks = self.journal.finish()
        train_chunks = int(np.searchsorted(chunks[:, 0], len(self._paths)))
        for count, paths in ((train_chunks, self._paths), (len(chunks) - train_chunks, self._validation_paths)):
            if paths and not count:
                raise sources.no_text(paths)
        tokens = int(chunks[-1, 1])
        if self._validation_paths:
            train, index = int(chunks[train_chunks - 1, 1]), train_chunks
        else:
            train = int(tokens * (1 - self._config.validation_share))
            index = int(np.searchsorted(chunks[:, 1], train, "right"))
        indexed = passages.begins_documents(tokenizer, self._special)
        header = {
            "format": MARKED_FORMAT if self._config.marks_targets else INDEXED_FORMAT if indexed else FORMAT,
            "dtype": f"uint{8 * itemsize(tokenizer)}",
            "train": train,
            "validation": tokens - train,
            "validation_bytes": self._validation_bytes(tokenizer, chunks, train, index),
            "tokenizer": tokenizer.hash,
            "sources": dict(zip(self._sources, self.journal.state.digests, strict=True)),
            **({"documents": self.journal.state.documents} if indexed else {}),
        }
        write_synced(self.journal.tokens / "header.json", json.dumps(header, indent=1).encode())
        self.journal.publish(self._folder)

    def _validation_bytes(self, tokenizer: Tokenizer, chunks: np.ndarray, train: int, index: int) -> int:
        """Return the bytes of the validation text, 0 where decoding doesn't restore texts: it has no bits per byte.

        Args:
            tokenizer: that of the folder.
            chunks: the content of ``places.bin``.
            train: the number of training tokens.
            index: the number of the chunk in which the validation text begins.
        """
        if (
            self._config.marks_targets or index == len(chunks) or isinstance(tokenizer, WordTokenizer)
        ):  # blanks and rare words are lost
            return 0
        _, first, before, _ = chunks[index - 1].tolist() if index else (0, 0, 0, 0)
        _, last, end, _ = chunks[index].tolist()
        dtype = np.dtype(f"<u{itemsize(tokenizer)}")
        offset = first * dtype.itemsize
        ids = np.fromfile(self.journal.tokens / "tokens.bin", dtype, last - first, offset=offset).tolist()
        budget = partial(tokenizer.within_budget, end - before)
        if not tokenizer.rewrites and budget(lambda: tokenizer.byte_count(ids)) == end - before:
            count = min(budget(lambda: tokenizer.byte_count(ids[: train - first])), end - before)
        else:  # special tokens between documents, or a tokenizer that changes texts
            passage = self._passage(chunks, index)
            if not budget(lambda: passages.preserved(tokenizer, passage)):
                return 0
            count = budget(lambda: passages.bytes_before(tokenizer, passage, train - first))
        return int(chunks[-1, 2]) - before - count

    def _passage(self, chunks: np.ndarray, index: int) -> Passage:
        """Read the passage of a chunk again."""
        number = int(chunks[index, 0])
        stream = ((chunk, 0) for chunk in sources.text_chunks(self._sources[number], self._form))
        own = index - int(np.searchsorted(chunks[:, 0], number))
        return next(islice(passages.passages(stream, True, self._special), own, None))[0]
