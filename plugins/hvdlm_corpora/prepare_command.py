"""Tokenize text into token files.

``python -m hvdlm prepare --data.path ... --output FOLDER``. Imports wait until the command runs: ``--help`` reads this.
"""

from __future__ import annotations

import sys
from typing import Any


def main(arguments: list[str]) -> int:
    """Prepare, and print the sizes of what was written."""
    from hvdlm.io.terminal import printable
    from hvdlm_corpora import mixture, preparation

    values = _parse(arguments)
    try:
        if values.data.mixture is None:
            corpora = {"": preparation.prepare(values.data, values.output, values.workers)}
        else:
            corpora = mixture.prepare(values.data, values.output, values.workers)
    except KeyboardInterrupt:
        print("hvdlm: interrupted; the same command resumes", file=sys.stderr, flush=True)
        return 130
    for name, data in corpora.items():
        counts = f"{len(data.train):,} training and {len(data.validation):,} validation tokens"
        folder = f"{name}: {data.folder}" if name else data.folder
        print(printable(f"{folder}: {counts}, vocabulary of {data.tokenizer.vocab:,}"))
    return 0


def _parse(arguments: list[str]) -> Any:
    from hvdlm.config import DataConfig
    from hvdlm.configuration import schema
    from hvdlm.configuration.parsing import command_parser
    from hvdlm.errors import HvdlmError

    parser = command_parser(
        "prepare",
        "Tokenize text into token files for --data.path.",
        "If it is killed, the same command resumes.",
    )
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--output", type=str, default=None, help="folder of the token files; default: the cache")
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="number of tokenizing processes; default: number of cores, 1 for short texts",
    )
    parser.known = {**schema.types_of({"data": DataConfig}), "output": str, "workers": int}
    values = parser.instantiate_classes(parser.parse_args(arguments))
    if values.workers is not None and values.workers < 1:
        raise HvdlmError(f"--workers: got {values.workers}, expected 1 or more.")
    return values
