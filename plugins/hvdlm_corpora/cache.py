"""The cache of token folders: where it is, and how a folder is named after its texts and settings."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.data.token_files import FORMAT
from hvdlm.io.user_folders import user_cache
from hvdlm_corpora import conversations, documents, sources


def folder(config: DataConfig) -> Path:
    """Return the folder of cached token folders."""
    if config.cache:
        return Path(config.cache)
    return user_cache() / "tokens"


def key(*configs: DataConfig) -> str:
    """Return a hash of these texts and settings, the name of what is made of them."""
    settings: list[Any] = [FORMAT]
    for config in configs:
        settings += [config.tokenizer, config.vocab_size, config.validation_share, config.field, config.separator]
        for group in (config.paths, config.validation_paths):
            settings += [*map(_source_identity, sources.expand(group, config.record_field)), "|"]
        if os.path.isfile(config.tokenizer):
            settings.append(_identity(config.tokenizer))
        if config.tokenizer not in ("byte", "char", "bpe"):  # special tokens have an effect
            settings += ["documents", config.add_special_tokens, config.split_special_tokens]
        if config.document_token is not None:
            settings += ["document_token", config.document_token]
        if config.by_document:  # earlier versions left folders without an index in the cache
            settings += ["rows"]
        if config.prompt is not None:
            settings += ["prompt", config.prompt]
        if config.chat is not None:
            settings += ["chat", config.chat, conversations.find(config).hash]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def _source_identity(source: str) -> list[Any]:
    if source == "embedded":
        return [source, hashlib.sha256(sources.embedded().encode()).hexdigest()]
    # Earlier versions read these as they are: the tokens that they left in the cache are others.
    decoded = documents.kind(source) in (".json", ".csv", ".tsv") or sources.is_decoded(source)
    return [*_identity(source), *(["decoded"] if decoded else [])]


def _identity(path: str) -> list[Any]:
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
