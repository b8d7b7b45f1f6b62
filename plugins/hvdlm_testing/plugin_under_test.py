"""The installed plugins that are tested, and the hooks and collections that each provides."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from hvdlm import hookspecs, plugins
from hvdlm.config import Config
from hvdlm.configuration import parsing
from hvdlm.errors import HvdlmError, nearest
from hvdlm.protocols.backend import StartsRanks

EVENTS = ("run_started", "step_ended", "evaluated", "checkpoint_saved", "rolled_back", "run_ended")
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("hvdlm_"))
COLLECTIONS = {"models": "hvdlm_models", "compressors": "hvdlm_compressors", "schedulers": "hvdlm_schedulers"}
COLLECTIONS |= {name: f"hvdlm_{name}" for name in ("tokenizers", "optimizers", "lr_schedules")}
MADE = {"framework": "hvdlm_make_framework", "backend": "hvdlm_make_backend", "task": "hvdlm_make_task"}
MADE["exchange"] = "hvdlm_make_exchange"


@dataclass
class PluginUnderTest:
    """A plugin under test.

    Attributes:
        name: name of its entry point.
        entry: the entry point.
        implementation: its module or instance; None if it doesn't load.
        error: why it doesn't load.
        config: YAML file with the options that it is tested with.
    """

    name: str
    entry: EntryPoint
    implementation: Any = None
    error: str = ""
    config: Path | None = None
    _members: dict[str, Any] = field(default_factory=dict)
    _config: Config | None = None

    @property
    def built_in(self) -> bool:
        """Whether it belongs to hvdlm's own distribution."""
        return self.entry.dist is not None and self.entry.dist.name == "hvdlm"

    def hooks(self) -> list[str]:
        """Return the names of its functions that begin like hooks."""
        names = [name for name in dir(self.implementation) if name.startswith("hvdlm_")]
        return [name for name in names if callable(getattr(self.implementation, name))]

    def provides(self, feature: str) -> bool:
        """Return whether it implements a hook or, for ``events``, any event, or has members of a collection."""
        if self.implementation is None:
            return False
        if feature == "events":
            return any(f"hvdlm_{event}" in self.hooks() for event in EVENTS)
        return bool(self.members(feature)) if feature in COLLECTIONS else feature in self.hooks()

    def members(self, collection: str) -> dict[str, Any]:
        """Return what a hook such as ``hvdlm_models`` returns; empty if it fails, which a separate test reports."""
        if collection not in self._members:
            try:
                self._members[collection] = dict(getattr(self.implementation, COLLECTIONS[collection])())
            except Exception:
                self._members[collection] = {}
        return self._members[collection]

    def arguments(self) -> list[str]:
        """Return the options of a run with this plugin, ``--config`` among them if one is given."""
        arguments = [] if self.config is None else ["--config", str(self.config)]
        if self.provides("hvdlm_make_task"):
            arguments += ["--task", self.name]
        return [*arguments, "--plugins", f"[{self.name}]"]

    def run_config(self, *arguments: str) -> Config:
        """Return the configuration of a run with this plugin and further ``arguments``; the caller may change it."""
        if arguments:
            return parsing.parse_config([*self.arguments(), *arguments])
        if self._config is None:  # parsing takes 0.1 s, and many tests ask for it
            self._config = parsing.parse_config(self.arguments())
        return copy.deepcopy(self._config)


def find(names: list[str], configs: list[str]) -> list[PluginUnderTest]:
    """Return the plugins of these names.

    Raises:
        HvdlmError: one is not installed, or a configuration belongs to none of them.
    """
    entries = plugins.installed()
    files = dict(config.partition("=")[::2] for config in configs)
    for name in names:
        if name not in entries:
            raise HvdlmError(f"--hvdlm-plugin: no plugin {name!r} is installed; {nearest(name, entries)}")
    for name, file in files.items():
        if name not in names or not Path(file).is_file():
            raise HvdlmError(f"--hvdlm-config {name}={file}: expected NAME=FILE.yaml of a plugin that is tested.")
    tested = []
    for name in dict.fromkeys(names):
        plugin = PluginUnderTest(name, entries[name], config=Path(files[name]).resolve() if name in files else None)
        _load(plugin)
        tested.append(plugin)
    return tested


def _load(plugin: PluginUnderTest) -> None:
    try:
        loaded = plugin.entry.load()
        plugin.implementation = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:  # a third party's module may raise anything
        plugin.error = f"{type(error).__name__}: {error}"


def frameworks() -> list[str]:
    """Return the installed ones of the built-in frameworks, without importing them."""
    return [name for name in ("torch", "tensorflow") if importlib.util.find_spec(name)]


def starter_of(backend: str) -> StartsRanks | None:
    """Return the backend of this name where it starts its ranks itself, as threads of one process."""
    made = plugins.make(plugins.load([backend]), "backend", backend) if backend else None
    return made if isinstance(made, StartsRanks) else None
