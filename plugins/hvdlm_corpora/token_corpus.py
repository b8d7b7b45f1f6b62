"""Corpora of token files of other frameworks (``data.path train.bin``), used as they are, without a copy."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hvdlm.config import DataConfig
from hvdlm.data.documents import Documents, JoinedDocuments, SplitDocuments
from hvdlm.data.token_files import StoredTokens, TokenData, Tokens, highest, is_prepared, spot_checked
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError, RankError
from hvdlm_corpora import splits, tokenizers
from hvdlm_corpora.progress_bar import note
from hvdlm_corpora.token_formats import Shard, read_shard

_SUFFIX, _INDEX = ".bin", ".idx"
_NO_TOKENIZER = ("char", "ids")  # char is the default: none was named
_OPEN_FILES = 32  # of a split with many files, whose others are opened again when they are read
_ADVICE = "give whole files, and resume the run (--checkpoint.resume auto)"


def is_tokens(paths: Sequence[str]) -> bool:
    """Return whether ``paths`` name token files of another framework; no file is read.

    Raises:
        HvdlmError: some of them do, others don't.
    """
    kinds = [bool(_training_files(path)) for path in paths]
    if any(kinds) and not all(kinds):
        raise HvdlmError(
            f"data.path: {paths[kinds.index(True)]} holds tokens, {paths[kinds.index(False)]} doesn't: mix them as "
            "two corpora (--data.mixture)."
        )
    return any(kinds)


def _training_files(path: str) -> list[Path]:
    """Return the token files to train on that ``path`` names: a file, its name without suffix, a pattern, a folder."""
    if os.path.isdir(path):
        return [] if is_prepared([path]) else _in_folder(Path(path))[0]
    if path.endswith((_SUFFIX, _INDEX)):
        names = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        return list(dict.fromkeys(Path(name).with_suffix(_SUFFIX) for name in names))
    if os.path.isfile(path + _SUFFIX) and os.path.isfile(path + _INDEX):  # as Megatron names them
        return [Path(path + _SUFFIX)]
    return []


def _in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the token files of the training and of the validation split in a folder."""
    files = sorted(str(path) for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith("."))
    by_split = splits.by_name(str(folder), files)
    validation = [file for name in splits.validation_split(by_split, set()) for file in by_split[name]]
    train = by_split.get(splits.TRAIN, [])
    if not by_split:
        train = [file for file in files if os.path.exists(file.removesuffix(_SUFFIX) + _INDEX)]
    return list(map(Path, train)), list(map(Path, validation)) if train else []


def _validation_files(config: DataConfig) -> list[Path]:
    """Return the token files of the validation split: those that are named, or lie beside the training files."""
    held_out: list[Path] = []
    for path in config.validation_paths:
        files = (_in_folder(Path(path))[1] if os.path.isdir(path) else []) or _training_files(path)
        if not files:
            raise HvdlmError(
                f"data.validation_path {path}: it names no token files, as data.path does: give the .bin file of a "
                "validation split."
            )
        held_out += files
    if config.validation_paths:
        return held_out
    for path in config.paths:
        files = _in_folder(Path(path))[1] if os.path.isdir(path) else _beside(_training_files(path))
        if files:
            note(f"data.path {path}: validation split {', '.join(file.name for file in files[:3])}")
        held_out += files
    return held_out


def _beside(files: Sequence[Path]) -> list[Path]:
    """Return the validation file beside one training file: of nanoGPT, val.bin beside train.bin."""
    if len(files) != 1:
        return []
    match = splits.NAMED.search(files[0].stem.lower())
    if match is None or match[1] not in (splits.TRAIN, "training"):
        return []
    before, after = files[0].name[: match.start(1)], files[0].name[match.end(1) :]
    others = [files[0].with_name(before + name + after) for name in splits.VALIDATION]
    return [other for other in others if other.is_file()][:1]


def tokenizer_name(config: DataConfig) -> str:
    """Return the tokenizer of token files, as ``data.tokenizer`` names it; ids where there is none.

    Raises:
        HvdlmError: none is known, nor the number of ids.
    """
    if config.tokenizer == "byte" or Path(config.tokenizer).is_file():
        return config.tokenizer
    if config.tokenizer not in _NO_TOKENIZER or config.vocab_size is None:
        named = f", and data.tokenizer {config.tokenizer} is none" if config.tokenizer not in _NO_TOKENIZER else ""
        raise HvdlmError(
            f"data.path {config.paths[0]}: token files need the tokenizer that encoded them{named}: name its "
            "tokenizer.json (--data.tokenizer PATH), or give its number of ids (--data.vocab_size 50257) and do "
            "without texts."
        )
    return "ids"


def open_files(config: DataConfig) -> TokenData:
    """Open the token files of ``config``.

    Raises:
        HvdlmError: one is damaged, or has ids that the tokenizer doesn't, or an option for texts is set.
    """
    _check_options(config)
    tokenizer = tokenizers.train(tokenizer_name(config), config.vocab_size, ())
    train = [read_shard(path) for path in itertools.chain.from_iterable(map(_training_files, config.paths))]
    validation = [read_shard(path) for path in _validation_files(config)]
    if not validation:
        total = sum(shard.count for shard in train)
        count = int(total * (1 - config.validation_share))
        train, validation = _cut(train, 0, count), _cut(train, count, total)
    splits_ = [_tokens(shards, tokenizer) for shards in (train, validation)]
    return TokenData(
        folder=Path(config.paths[0]),
        tokenizer=tokenizer,
        train=splits_[0],
        validation=splits_[1],
        validation_bytes=0,
        fingerprint=_fingerprint(splits_, tokenizer),
        train_documents=_documents(train),
        validation_documents=_documents(validation),
    )


def _check_options(config: DataConfig) -> None:
    """Refuse options that would have no effect on tokens.

    Raises:
        HvdlmError: one is set.
    """
    if config.document_token is not None:
        raise HvdlmError(
            f"data.document_token: {config.paths[0]} holds tokens, to which none are added: leave it out, or encode "
            "the texts again with it."
        )
    if config.marks_targets:
        raise HvdlmError(
            f"data.{config.marking_option}: {config.paths[0]} holds tokens, of which all are targets: leave it out, or "
            "give the records themselves."
        )
    folder = next((path for path in config.paths if os.path.isdir(path)), None)
    if folder is not None and config.split != splits.TRAIN:
        raise HvdlmError(
            f"data.split {config.split}: of {folder}, which holds token files, train is read: name other files in "
            "--data.path and --data.validation_path."
        )


def _cut(shards: Sequence[Shard], first: int, last: int) -> list[Shard]:
    """Return the ids ``first:last`` of all shards."""
    cut, start = [], 0
    for shard in shards:
        low, high = max(first - start, 0), min(last - start, shard.count)
        if low < high:
            cut.append(replace(shard, first=shard.first + low, count=high - low))
        start += shard.count
    return cut


def _tokens(shards: Sequence[Shard], tokenizer: Tokenizer) -> Tokens:
    """Return the ids of shards, spot-checked against the vocabulary.

    Raises:
        HvdlmError: a shard holds an id that the tokenizer doesn't know, or can't be read.
    """
    tokens = JoinedTokens(shards)
    try:
        most = highest(tokens)
        if most >= tokenizer.vocab:  # name the file; without an error, a few blocks of all are read
            path = next((s.path for s in shards if highest(JoinedTokens([s])) >= tokenizer.vocab), shards[0].path)
            raise HvdlmError(
                f"data.path {path}: it holds the id {most}, and the tokenizer has {tokenizer.vocab} ids: give the one "
                "that encoded it (--data.tokenizer PATH), or its number of ids (--data.vocab_size N)."
            )
    except RankError as error:
        raise HvdlmError(f"data.path: {error}") from error
    return tokens


def _documents(shards: Sequence[Shard]) -> Documents | None:
    """Return where the documents of shards begin, None where one of them has no index."""
    segments: list[tuple[Documents, int]] = []
    tokens = 0
    for shard in shards:
        if shard.documents is None:
            return None
        segments.append((SplitDocuments(shard.documents, shard.first, shard.first + shard.count), tokens))
        tokens += shard.count
    return JoinedDocuments(segments)


def _open(shard: Shard) -> StoredTokens:
    return StoredTokens(shard.path, shard.dtype, shard.first, shard.count, _ADVICE)


class JoinedTokens:
    """The ids of several files in a row, of which a limited number are open at a time."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._edges = np.cumsum([0, *(shard.count for shard in shards)])
        # Not a method: a cache of bound methods would keep files open in a cycle of references.
        self._opened = functools.lru_cache(_OPEN_FILES)(_open)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, ids: slice) -> np.ndarray:
        """Return a part without a step.

        Raises:
            RankError: a file no longer holds it.
        """
        first, last, _ = ids.indices(len(self))
        number = int(np.searchsorted(self._edges, first, "right")) - 1
        segments = []
        while first < last:
            start, end = self._edges[number : number + 2].tolist()
            try:
                opened = self._opened(self._shards[number])
            except OSError as error:
                raise RankError(
                    f"{self._shards[number].path} can't be opened ({error.strerror}): {_ADVICE}."
                ) from error
            segments.append(opened[first - start : min(last, end) - start])
            first, number = min(last, end), number + 1
        return segments[0] if len(segments) == 1 else np.concatenate([np.zeros(0, np.uint8), *segments])


def _fingerprint(tokens: Sequence[Tokens], tokenizer: Tokenizer) -> str:
    """Return a hash of the ids that are checked when the files are opened; to read all would take too long."""
    digest = hashlib.sha256(json.dumps([tokenizer.hash, *map(len, tokens)]).encode())
    for split in tokens:
        for block in spot_checked(split):
            digest.update(block.astype("<u4").tobytes())
    return digest.hexdigest()
