"""List installed plugins, what they provide and their versions."""

from __future__ import annotations

from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io.terminal import printable

_COLLECTIONS = (
    "compressors", "lr_schedules", "models", "optimizers", "options", "probes", "schedulers", "tokenizers",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print a table of all plugins; broken ones say why."""
    from hvdlm.configuration.parsing import command_parser

    command_parser("plugins", "List installed plugins, what they provide and their versions.").parse_args(arguments)
    rows = [("plugin", "from", "module", "provides"), *describe()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(printable("  ".join([*cells, row[3]])))
    return 0


def describe() -> list[tuple[str, str, str, str]]:
    """Return (name, distribution and version, module, what it provides) of every plugin; broken ones say why."""
    from hvdlm import plugins

    rows = []
    for name, entry in sorted(plugins.installed().items()):
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
        try:
            plugin = plugins.import_plugin(entry)
            hooks = sorted(h.removeprefix("hvdlm_") for h in dir(plugin) if h.startswith("hvdlm_"))
            provides = ", ".join(_with_names(plugin, hook) for hook in hooks) or "nothing"
        except HvdlmError as error:
            provides = f"BROKEN: {error}"
        rows.append((name, origin, entry.value, provides))
    return rows


def _with_names(plugin: Any, hook: str) -> str:
    """Return a hook's name, and of a hook that brings a collection what it holds."""
    if hook not in _COLLECTIONS:
        return hook
    return f"{hook} ({', '.join(getattr(plugin, f'hvdlm_{hook}')())})"
