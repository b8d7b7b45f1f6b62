"""The reporting of runs: event plugins that every run has, and what happens when one fails."""

from __future__ import annotations

from hvdlm.config import Config


def default_plugins(config: Config) -> list[object]:
    """Return the event plugins of every run, as installed packages make them of the options.

    Each is called before those in front of it in the list.
    """
    from hvdlm import plugins  # imports numpy, whose threads must not be there before signals are blocked

    return [plugin for make in plugins.extensions("observers") for plugin in make(config)]
