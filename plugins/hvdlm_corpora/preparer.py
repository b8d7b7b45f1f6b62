"""The preparer of texts: what the core calls before a run trains on texts."""

from __future__ import annotations

from collections.abc import Sequence

from hvdlm.config import DataConfig
from hvdlm.data.corpora import Corpus
from hvdlm_corpora import conversations, mixture, preparation


class TextPreparer:
    """Prepares texts; see ``hvdlm.protocols.data_preparer``."""

    def check(self, data: DataConfig) -> None:
        """Check the options of a mixture."""
        mixture.read(data)

    def chat_prompt(self, data: DataConfig, prompt: str) -> str:
        """Return the text that the assistant continues where a user says ``prompt``."""
        corpora = [data] if data.mixture is None else [corpus.config for corpus in mixture.read(data)]
        return conversations.ChatWriter(conversations.find(*corpora)).prompt([{"role": "user", "content": prompt}])

    def store_stdin(self, data: DataConfig) -> DataConfig:
        """Store standard input in the cache."""
        return preparation.without_stdin(data)

    def open(self, data: DataConfig) -> Sequence[Corpus]:
        """Open the token folders of ``data``, tokenized where they are not yet."""
        if data.mixture is None:
            return [Corpus("", 1.0, preparation.prepare(data))]
        return mixture.open_corpora(data)
