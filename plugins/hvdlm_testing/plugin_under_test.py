"""What is tested: installed plugins, and what each provides."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from hvdlm import hookspecs, plugins
from hvdlm.config import Config
from hvdlm.configuration import parsing
from hvdlm.errors import HvdlmError, nearest

EVENTS = ("run_started", "step_ended", "evaluated", "checkpoint_saved", "rolled_back", "run_ended")
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("hvdlm_"))
COLLECTIONS = {"models": "hvdlm_models", "compressors": "hvdlm_compressors", "schedulers": "hvdlm_schedulers"}
MADE = {"framework": "hvdlm_make_framework", "backend": "hvdlm_make_backend", "task": "hvdlm_make_task"}
MADE["exchange"] = "hvdlm_make_exchange"


@dataclass
class Subject:
    """A plugin under test.

    Attributes:
        name: its entry point's.
        entry: where it is.
        plugin: its module or instance; None where it doesn't load, and ``error`` says why.
        config: the YAML file with the options it is tested with.
    """

    name: str
    entry: EntryPoint
    plugin: Any = None
    error: str = ""
    config: Path | None = None
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def built_in(self) -> bool:
        """Whether it comes with hvdlm."""
        return self.entry.dist is not None and self.entry.dist.name == "hvdlm"

    def hooks(self) -> list[str]:
        """Return the names in the plugin that begin as hooks do."""
        return [name for name in dir(self.plugin) if name.startswith("hvdlm_") and callable(getattr(self.plugin, name))]

    def provides(self, what: str) -> bool:
        """Return whether it has a hook, or one for ``events``, or brings members of a collection."""
        if self.plugin is None:
            return False
        if what == "events":
            return any(f"hvdlm_{event}" in self.hooks() for event in EVENTS)
        return bool(self.members(what)) if what in COLLECTIONS else what in self.hooks()

    def members(self, collection: str) -> dict[str, Any]:
        """Return what a hook such as ``hvdlm_models`` returns; empty where it fails, which a test of its own says."""
        if collection not in self._made:
            try:
                self._made[collection] = dict(getattr(self.plugin, COLLECTIONS[collection])())
            except Exception:
                self._made[collection] = {}
        return self._made[collection]

    def arguments(self) -> list[str]:
        """Return the options of a run that names it; ``--config`` among them where one is given."""
        named = [] if self.config is None else ["--config", str(self.config)]
        named += ["--task", self.name] if self.provides("hvdlm_make_task") else []
        return [*named, "--plugins", f"[{self.name}]"]

    def run_config(self, *more: str) -> Config:
        """Return the configuration of a run that names it."""
        return parsing.parse_config([*self.arguments(), *more], {})


def find(names: list[str], configs: list[str]) -> list[Subject]:
    """Return the plugins of these names.

    Raises:
        HvdlmError: one is not installed, or a configuration belongs to none.
    """
    entries = plugins.installed()
    files = dict(config.partition("=")[::2] for config in configs)
    for name in names:
        if name not in entries:
            raise HvdlmError(f"--hvdlm-plugin: no plugin {name!r} is installed; {nearest(name, entries)}")
    for name, file in files.items():
        if name not in names or not Path(file).is_file():
            raise HvdlmError(f"--hvdlm-config {name}={file}: expected NAME=FILE.yaml of a plugin that is tested.")
    found = []
    for name in dict.fromkeys(names):
        subject = Subject(name, entries[name], config=Path(files[name]).resolve() if name in files else None)
        _load(subject)
        found.append(subject)
    return found


def _load(subject: Subject) -> None:
    try:
        plugin = subject.entry.load()
        subject.plugin = plugin() if isinstance(plugin, type) else plugin
    except Exception as error:  # whatever a third party's module raises is a finding
        subject.error = f"{type(error).__name__}: {error}"


def frameworks() -> list[str]:
    """Return the built-in frameworks that are installed, without importing them."""
    return [name for name in ("torch", "tensorflow") if importlib.util.find_spec(name)]
