"""The corpora of a run: token folders are opened here, other data by the plugin that prepares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdlm import plugins
from hvdlm.config import Config, DataConfig
from hvdlm.data.token_files import TokenData, is_prepared, open_tokens
from hvdlm.errors import HvdlmError
from hvdlm.protocols.data_preparer import DataPreparer, WritesChats


@dataclass(frozen=True)
class Corpus:
    """An open corpus; ``share``: its weight divided by the sum of all. Outside of a mixture it has no name."""

    name: str
    share: float
    data: TokenData


def open_corpora(config: Config) -> list[Corpus]:
    """Return the corpora of ``config``, tokenized where they are not yet.

    Raises:
        HvdlmError: a source can't be used, or the token folders can't be written.
    """
    data = config.data
    if data.mixture is None and is_prepared(data.paths):
        return [Corpus("", 1.0, open_tokens(Path(data.paths[0])))]
    return list(_preparer(config).open(data))


def chat_prompt(config: Config, prompt: str) -> str:
    """Return the text that the assistant continues where a user says ``prompt``, by the chat template of the data.

    Raises:
        HvdlmError: there is no chat template, or it fails.
    """
    preparer = _preparer(config)
    if not isinstance(preparer, WritesChats):
        raise HvdlmError("--chat: the plugin that prepared these data knows no chat template: leave it out.")
    return preparer.chat_prompt(config.data, prompt)


def check(config: Config) -> None:
    """Check the options of a mixture.

    Raises:
        HvdlmError: they contradict each other.
    """
    if config.data.mixture is not None:
        _preparer(config).check(config.data)


def store_stdin(config: Config) -> DataConfig:
    """Return the data options with standard input stored in a file: it is read again when a run is resumed."""
    data = config.data
    return _preparer(config).store_stdin(data) if "-" in (*data.paths, *data.validation_paths) else data


def _preparer(config: Config) -> DataPreparer:
    """Return the preparer of this data, of the plugins of ``config`` or else of ``hvdlm_corpora``."""
    manager = plugins.load(["corpora", *config.plugins])  # the hook of the last one is called first
    preparer: DataPreparer | None = manager.hook.hvdlm_data_preparer(data=config.data)
    if preparer is None:
        raise HvdlmError(
            f"data.path {', '.join(config.data.paths)}: no plugin prepares such data: give a token folder, or install "
            "the plugin corpora."
        )
    return preparer


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Return a hash of the data, names and shares of all corpora; of one without a name, that of its data."""
    if len(corpora) == 1 and not corpora[0].name:
        return corpora[0].data.fingerprint
    identity = [[corpus.name, corpus.share, corpus.data.fingerprint] for corpus in corpora]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
