"""The options that a user gave, on the command line or in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdlm.config import Config
from hvdlm.configuration.parsing import as_options, read_yaml, values_of
from hvdlm.configuration.schema import types_of


def given_options(arguments: Sequence[str]) -> set[str]:
    """Return the full names of the options in ``arguments`` and in the files that they name by ``--config``.

    Raises:
        HvdlmError: a file can't be read.
    """
    known = types_of({"": Config})
    files = [read_yaml(Path(name)) for name in values_of("--config", list(arguments))]
    options = [option for content in files for option in as_options(content, known, "")]
    names = [option.partition("=")[0].removeprefix("--") for option in (*arguments, *options)]
    return {name for name in names if name in known}
