"""Data preparers: they turn the texts that ``data.path`` names into token folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from hvdlm.config import DataConfig
    from hvdlm.data.corpora import Corpus


@runtime_checkable
class WritesChats(Protocol):
    """A preparer that writes conversations by a chat template. Optional: ``generate --chat`` needs it."""

    def chat_prompt(self, data: DataConfig, prompt: str) -> str:
        """Return the text that the assistant continues where a user says ``prompt``.

        Raises:
            HvdlmError: there is no chat template, or it fails.
        """


class DataPreparer(Protocol):
    """Prepares the data of the task ``language_model`` where they aren't a token folder yet.

    Ranks aren't connected yet: each calls, and of those that share a folder one has to do the work.
    """

    def check(self, data: DataConfig) -> None:
        """Raise HvdlmError where the options contradict each other; called early, no file may be read."""

    def store_stdin(self, data: DataConfig) -> DataConfig:
        """Return ``data`` with a file, which holds standard input, in place of ``-``."""

    def open(self, data: DataConfig) -> Sequence[Corpus]:
        """Return the open token folder of ``data``, those of a mixture in the order of their names.

        Raises:
            HvdlmError: a source can't be read, or a folder can't be written.
        """
