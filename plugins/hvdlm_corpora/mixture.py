"""Mixtures of corpora by weight (``data.mixture``): one tokenizer for all, a token folder for each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.data.corpora import Corpus
from hvdlm.data.token_files import TokenData, is_prepared, open_tokens
from hvdlm.data.tokenizers import find_kind
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io import safe_files
from hvdlm.io.atomic_files import replace as write_whole
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import cache, compression, corpus_files, hub_data, preparation, splits, token_corpus
from hvdlm_corpora.write_lock import writing

_TEXTS = ("field", "prompt", "chat", "separator")
_NONE = ("prompt", "chat")  # may be null: what data.prompt or data.chat name for all is not for this corpus
_KEYS = ("path", "weight", "validation_path", *_TEXTS)
_EXAMPLE = "write for example --data.mixture '{wiki.txt: 3, books.txt: 1}'"


@dataclass(frozen=True)
class CorpusConfig:
    """The settings of one corpus of a mixture; ``config``: the data options, with the paths of this corpus."""

    name: str
    weight: float
    config: DataConfig


def read(config: DataConfig) -> list[CorpusConfig]:
    """Return the corpora of ``data.mixture``, sorted by name, so that the order of the options has no effect.

    Raises:
        HvdlmError: the mixture is not valid.
    """
    if not config.mixture:
        raise HvdlmError(f"data.mixture: it holds no corpus: {_EXAMPLE}.")
    if config.path != DataConfig().path or config.validation_path is not None:
        raise HvdlmError(
            "data.mixture: data.path and data.validation_path are given too: leave them out, or the mixture "
            "(--data.mixture null)."
        )
    if config.sampling != "shuffled":
        raise HvdlmError(
            f"data.mixture: corpora can only be mixed in shuffled order, and data.sampling is {config.sampling}: use "
            "--data.sampling shuffled."
        )
    corpora = sorted((_corpus(config, key, value) for key, value in config.mixture.items()), key=lambda c: c.name)
    for first, second in pairwise(corpora):
        if first.name == second.name:
            raise HvdlmError(
                f"data.mixture: two corpora are called {first.name}: name them, for example "
                "{first: {path: ..., weight: 1}, second: {path: ..., weight: 1}}."
            )
    return corpora


def _corpus(config: DataConfig, key: str, value: Any) -> CorpusConfig:
    settings = value if isinstance(value, Mapping) else {"weight": value}
    where = f"data.mixture {shown(key)}"
    for name in settings:
        if name not in _KEYS:
            raise HvdlmError(f"{where}: there is no {shown(repr(name))}; {nearest(str(name), _KEYS)}")
    weight = settings.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise HvdlmError(f"{where}: the weight is {shown(repr(weight))}, expected a number above 0: {_EXAMPLE}.")
    texts = {name: settings[name] for name in _TEXTS if name in settings}
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and name in _NONE):
            raise HvdlmError(f"{where}: {name} is {shown(repr(text))}, expected text.")
    path = _paths(settings.get("path", key), f"{where}: path")
    held_out = settings.get("validation_path")
    if held_out is not None:
        held_out = _paths(held_out, f"{where}: validation_path")
    name = key if "path" in settings else _name_of(key)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise HvdlmError(
            f"{where}: a name consists of letters, digits, -, _ and dots: name it, for example "
            f"{{name: {{path: {shown(json.dumps(path))}, weight: {weight}}}}}."
        )
    config = replace(config, mixture=None, path=path, validation_path=held_out, **texts)
    if config.chat is not None and config.prompt is not None:
        raise HvdlmError(
            f"{where}: chat {shown(config.chat)} and prompt {shown(config.prompt)} both say which tokens are targets: "
            "set one of them to null."
        )
    return CorpusConfig(name, float(weight), config)


def _paths(value: Any, where: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise HvdlmError(f"{where} is {shown(repr(value))}, expected a path or a list of paths.")
    if "-" in paths:
        raise HvdlmError(f"{where} is standard input: python -m hvdlm prepare --data.path - --output FOLDER first.")
    return paths


def _name_of(path: str) -> str:
    """Return the name of a corpus that is given by its path alone: the file name without its suffix."""
    name = Path(path).name
    name = name.removesuffix(compression.suffix(name))
    suffix = next((suffix for suffix in corpus_files.SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix).removesuffix(".txt").removesuffix(".bin").removesuffix(".idx")


def open_corpora(config: DataConfig) -> list[Corpus]:
    """Return the corpora of ``data.mixture``, tokenized where they are not yet.

    Raises:
        HvdlmError: a source can't be used, or the token folders can't be written.
    """
    corpora = _with_one_tokenizer(config, read(config))
    total = math.fsum(corpus.weight for corpus in corpora)
    return [Corpus(corpus.name, corpus.weight / total, preparation.prepare(corpus.config)) for corpus in corpora]


def prepare(config: DataConfig, output: str | None, workers: int | None) -> dict[str, TokenData]:
    """Tokenize every corpus of a mixture, into the cache or into folders by their names in ``output``.

    Raises:
        HvdlmError: a source can't be used, or the folders can't be written.
    """
    corpora = _with_one_tokenizer(config, read(config))
    if output is None:
        return {corpus.name: preparation.prepare(corpus.config, None, workers) for corpus in corpora}
    folder = Path(output)
    preparation.check_free(folder)
    for corpus in corpora:
        if is_prepared(corpus.config.paths) or token_corpus.is_tokens(corpus.config.paths):
            raise HvdlmError(f"--output {folder}: data.mixture {corpus.name} is prepared already: leave it out.")
    partial = folder.parent / f".{folder.name}.{cache.key(*(corpus.config for corpus in corpora))}"
    with writing(folder, wait=False):
        if safe_files.kind(partial) == "symbolic link":
            safe_files.delete_file(partial)
        partial.mkdir(exist_ok=True)
        for corpus in corpora:
            if not is_prepared([str(partial / corpus.name)]):
                preparation.prepare(corpus.config, str(partial / corpus.name), workers)
        partial.rename(folder)  # takes the place of an empty folder only
    return {corpus.name: open_tokens(folder / corpus.name) for corpus in corpora}


def _with_one_tokenizer(config: DataConfig, corpora: Sequence[CorpusConfig]) -> list[CorpusConfig]:
    """Return the corpora with the tokenizer of those that are prepared, else with one trained on the text of all."""
    corpora = [replace(corpus, config=hub_data.local(corpus.config)) for corpus in corpora]
    prepared = {
        corpus.name: open_tokens(Path(corpus.config.paths[0])) for corpus in corpora if is_prepared(corpus.config.paths)
    }
    if prepared:
        name, first = next(iter(prepared.items()))
        for other, data in prepared.items():
            if data.tokenizer.hash != first.tokenizer.hash:
                raise HvdlmError(
                    f"data.mixture {other}: its tokenizer differs from {name}'s: prepare both together, or one "
                    f"with --data.tokenizer {first.folder / 'tokenizer.json'}."
                )
        chosen = str(first.folder / "tokenizer.json")
    else:
        files = [corpus for corpus in corpora if token_corpus.is_tokens(corpus.config.paths)]
        texts = [corpus for corpus in corpora if corpus not in files]
        texts = [replace(corpus, config=splits.choose(corpus.config)) for corpus in texts]
        for corpus in texts:
            preparation.check_sources(corpus.config)
        chosen = token_corpus.tokenizer_name(files[0].config) if files else _trained(config, texts)
        corpora = sorted([*files, *texts], key=lambda corpus: corpus.name)
    corpora = [replace(corpus, config=replace(corpus.config, tokenizer=chosen)) for corpus in corpora]
    holds_tokens = [token_corpus.is_tokens(corpus.config.paths) for corpus in corpora]
    if all(holds_tokens):
        return corpora
    # data.document_token is then meant for the others, and token files refuse it.
    return [
        replace(corpus, config=replace(corpus.config, document_token=None)) if tokens else corpus
        for corpus, tokens in zip(corpora, holds_tokens, strict=True)
    ]


def _trained(config: DataConfig, corpora: Sequence[CorpusConfig]) -> str:
    """Return the path of a tokenizer trained on all texts, or the name of a kind that needs no training."""
    if config.tokenizer == "byte" or find_kind(config.tokenizer) is None:
        return config.tokenizer
    path = cache.folder(config) / f"tokenizer-{cache.key(*(corpus.config for corpus in corpora))}.json"
    with writing(path):
        if not path.is_file():
            groups = [
                (paths, preparation.form_of(corpus.config))
                for corpus in corpora
                for paths in (corpus.config.paths, corpus.config.validation_paths)
                if paths
            ]
            write_whole(path, json.dumps(preparation.train_tokenizer(config, groups).to_json()))
    return str(path)
