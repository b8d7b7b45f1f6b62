"""Corpora mixed by weight: what ``data.mixture`` says, one tokenizer for all, a token folder for each."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.data import preparation, sources, splits
from hvdlm.data.documents import Form
from hvdlm.data.token_files import TokenData, is_prepared, open_tokens
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io.atomic_files import replace as write_whole
from hvdlm.io.untrusted_input import shown

_KEYS = ("path", "weight", "validation_path", "field", "separator")
_EXAMPLE = "write for example --data.mixture '{wiki.txt: 3, books.txt: 1}'"


@dataclass(frozen=True)
class Corpus:
    """One corpus of a mixture, open; ``share`` is its weight divided by all. The only one of no mixture has no name."""

    name: str
    share: float
    data: TokenData


@dataclass(frozen=True)
class Part:
    """What a mixture says of one corpus: ``config`` has its paths."""

    name: str
    weight: float
    config: DataConfig


def read(config: DataConfig) -> list[Part]:
    """Return the parts of ``data.mixture`` in the order of their names, which doesn't depend on how they were given.

    Raises:
        HvdlmError: it is no mixture.
    """
    said = config.mixture
    if not said:
        raise HvdlmError(f"data.mixture: it holds no corpus: {_EXAMPLE}.")
    if config.path != DataConfig().path or config.validation_path is not None:
        raise HvdlmError(
            "data.mixture: data.path and data.validation_path are given too: leave them out, or the mixture "
            "(--data.mixture null)."
        )
    if config.sampling != "shuffled":
        raise HvdlmError(
            f"data.mixture: corpora can't be read one window after the other by turns: data.sampling is "
            f"{config.sampling}, --data.sampling shuffled mixes them."
        )
    parts = sorted((_part(config, key, value) for key, value in said.items()), key=lambda part: part.name)
    for first, second in pairwise(parts):
        if first.name == second.name:
            raise HvdlmError(
                f"data.mixture: two corpora are called {first.name}: name them, for example "
                "{first: {path: ..., weight: 1}, second: {path: ..., weight: 1}}."
            )
    return parts


def _part(config: DataConfig, key: str, value: Any) -> Part:
    said = {"weight": value} if not isinstance(value, Mapping) else value
    where = f"data.mixture {shown(key)}"
    for name in said:
        if name not in _KEYS:
            raise HvdlmError(f"{where}: there is no {shown(repr(name))}; {nearest(str(name), _KEYS)}")
    weight = said.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise HvdlmError(f"{where}: the weight is {shown(repr(weight))}, expected a number above 0: {_EXAMPLE}.")
    texts = {name: said[name] for name in ("field", "separator") if name in said}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise HvdlmError(f"{where}: {name} is {shown(repr(text))}, expected text.")
    path, held_out = _paths(said.get("path", key), f"{where}: path"), said.get("validation_path")
    if held_out is not None:
        held_out = _paths(held_out, f"{where}: validation_path")
    name = key if "path" in said else _called(key)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise HvdlmError(
            f"{where}: a name is made of letters, digits, -, _ and dots: name it, for example "
            f"{{name: {{path: {shown(json.dumps(path))}, weight: {weight}}}}}."
        )
    own = replace(config, mixture=None, path=path, validation_path=held_out, **texts)
    return Part(name, float(weight), own)


def _paths(value: Any, where: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise HvdlmError(f"{where} is {shown(repr(value))}, expected a path or a list of paths.")
    if "-" in paths:
        raise HvdlmError(f"{where} is standard input: python -m hvdlm prepare --data.path - --output FOLDER first.")
    return paths


def _called(path: str) -> str:
    """Return the name of a corpus that is called by its path: the last part of it, without what tells its kind."""
    name = Path(path).name
    suffix = max((suffix for suffix in sources.SUFFIXES if name.endswith(suffix)), key=len, default="")
    return name.removesuffix(suffix).removesuffix(".txt")


def open_corpora(config: DataConfig) -> list[Corpus]:
    """Return the corpora of ``config``, tokenized where they are not yet; one without a name where there is no mixture.

    Raises:
        HvdlmError: a source can't be used, or the token folders can't be written.
    """
    if config.mixture is None:
        return [Corpus("", 1.0, preparation.prepare(config))]
    parts = _with_one_tokenizer(config, read(config))
    total = math.fsum(part.weight for part in parts)
    return [Corpus(part.name, part.weight / total, preparation.prepare(part.config)) for part in parts]


def prepare(config: DataConfig, output: str | None, workers: int | None) -> dict[str, TokenData]:
    """Tokenize every corpus of a mixture, into the cache or into folders by their names in ``output``.

    Raises:
        HvdlmError: a source can't be used, or the folders can't be written.
    """
    parts = _with_one_tokenizer(config, read(config))
    if output is None:
        return {part.name: preparation.prepare(part.config, None, workers) for part in parts}
    folder = Path(output)
    preparation.check_free(folder)
    for part in parts:
        if is_prepared(part.config.paths):
            raise HvdlmError(f"--output {folder}: data.mixture {part.name} is prepared already: leave it out.")
    begun = folder.parent / f".{folder.name}.{preparation.key(*(part.config for part in parts))}"
    with preparation.writing(folder):
        begun.mkdir(exist_ok=True)
        for part in parts:
            if not is_prepared([str(begun / part.name)]):
                preparation.prepare(part.config, str(begun / part.name), workers)
        for lock in begun.glob(".*.lock"):
            lock.unlink()
        if folder.is_dir():
            folder.rmdir()
        begun.rename(folder)
    return {part.name: open_tokens(folder / part.name) for part in parts}


def _with_one_tokenizer(config: DataConfig, parts: Sequence[Part]) -> list[Part]:
    """Return the parts with the tokenizer of those that are prepared, else with one trained on the text of all."""
    prepared = {part.name: open_tokens(Path(part.config.paths[0])) for part in parts if is_prepared(part.config.paths)}
    if prepared:
        name, first = next(iter(prepared.items()))
        for other, data in prepared.items():
            if data.tokenizer.hash != first.tokenizer.hash:
                raise HvdlmError(
                    f"data.mixture {other}: its tokenizer is another than {name}'s: prepare both together, or one "
                    f"with --data.tokenizer {first.folder / 'tokenizer.json'}."
                )
        chosen = str(first.folder / "tokenizer.json")
    else:
        parts = [replace(part, config=splits.choose(part.config)) for part in parts]
        for part in parts:
            preparation.check_sources(part.config)
        chosen = _trained(config, parts)
    return [replace(part, config=replace(part.config, tokenizer=chosen)) for part in parts]


def _trained(config: DataConfig, parts: Sequence[Part]) -> str:
    """Return the path of the tokenizer of all texts, or the name of one that needs none."""
    if config.tokenizer not in ("char", "word", "bpe"):
        return config.tokenizer
    path = preparation.cache(config) / f"tokenizer-{preparation.key(*(part.config for part in parts))}.json"
    with preparation.writing(path):
        if not path.is_file():
            groups = [
                (paths, Form(part.config.field, part.config.separator))
                for part in parts
                for paths in (part.config.paths, part.config.validation_paths)
                if paths
            ]
            write_whole(path, json.dumps(preparation.train_tokenizer(config, groups).to_json()))
    return str(path)


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Return what tells the data of all corpora, their names and shares."""
    if len(corpora) == 1 and not corpora[0].name:
        return corpora[0].data.fingerprint
    said = [[corpus.name, corpus.share, corpus.data.fingerprint] for corpus in corpora]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
