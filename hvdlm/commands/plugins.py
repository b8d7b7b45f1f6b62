"""List installed plugins: ``python -m hvdlm plugins``."""

from __future__ import annotations

from hvdlm.configuration.parsing import command_parser
from hvdlm.io.terminal import printable
from hvdlm.plugins import describe


def main(arguments: list[str]) -> int:
    """Print a table of all plugins; broken ones say why."""
    command_parser("plugins", "List installed plugins, what they provide and their versions.").parse_args(arguments)
    rows = [("plugin", "from", "module", "provides"), *describe()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(printable("  ".join([*cells, row[3]])))
    return 0
