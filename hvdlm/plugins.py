"""Discovers plugins by entry point (group ``hvdlm``) and imports only those that a run uses."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal, overload

import pluggy

from hvdlm import hookspecs
from hvdlm.config import Config, TrainConfig
from hvdlm.errors import HvdlmError, nearest
from hvdlm.models.spec import ModelMaker
from hvdlm.protocols.framework import Framework, Probe
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.state_dict import OPTIMIZER_STATE

if TYPE_CHECKING:
    from hvdlm.protocols.backend import Backend
    from hvdlm.protocols.exchange import Exchange
    from hvdlm.protocols.group import Group
    from hvdlm.protocols.task import Task
    from hvdlm.protocols.world import World

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "step", "wsd")


def installed() -> dict[str, EntryPoint]:
    """Return {name: entry point} of every installed plugin, nothing imported."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="hvdlm")}


def load(names: Iterable[str]) -> pluggy.PluginManager:
    """Return a manager with the named plugins registered; a name without an entry point may be another plugin's.

    Raises:
        HvdlmError: a plugin can't be imported, or a hook's arguments are wrong.
    """
    manager = pluggy.PluginManager("hvdlm")
    manager.add_hookspecs(hookspecs)
    entries, known = installed(), importlib.metadata.entry_points(group="hvdlm")  # asked once for all names
    loaded: set[str] = set()
    for name in dict.fromkeys(names):
        if name in entries and entries[name].value not in loaded:  # of several names of one plugin, the first
            loaded.add(entries[name].value)
            _refuse_several("plugins", name, {entry.value for entry in known if entry.name == name})
            try:
                manager.register(import_plugin(entries[name]), name)
            except pluggy.PluginValidationError as error:  # a hook with an argument that does not exist
                raise HvdlmError(f"plugin {name}: {' '.join(str(error).split())}.") from None
    return manager


def import_plugin(entry: EntryPoint) -> Any:
    """Return the plugin of an entry point, made where it is a class; raise HvdlmError where it does not import."""
    try:
        plugin = entry.load()
    except Exception as error:  # a third party's module may fail in any way
        raise HvdlmError(
            f"plugin {entry.name} ({entry.value}) does not import: {type(error).__name__}: {error}. "
            "Repair or uninstall it."
        ) from error
    return plugin() if isinstance(plugin, type) else plugin


@contextlib.contextmanager
def keras_alone() -> Iterator[None]:
    """Hide scikit-learn and matplotlib while keras, or TensorFlow, which imports it, is imported.

    keras imports them, where they are installed, for wrappers and plots that no run uses: a third of the time in which
    a rank starts, and thousands of files that all ranks of a cluster read at once.
    """
    hidden = [name for name in ("sklearn", "matplotlib") if name not in sys.modules]
    # None makes imports fail and importlib.util.find_spec return None, as torch expects where a package is not
    # installed; a finder on sys.meta_path can't do both.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def extensions(group: str) -> list[Callable[..., Any]]:
    """Return the functions in the entry point group ``hvdlm.GROUP`` of all installed packages (docs/plugins.md).

    Raises:
        HvdlmError: one can't be imported.
    """
    entries = importlib.metadata.entry_points(group=f"hvdlm.{group}")
    return [import_plugin(entry) for entry in sorted(entries, key=lambda entry: entry.name)]


def check_keras(config: Config) -> None:
    """Check that keras, where a run uses it, isn't loaded for another framework: it can't change in a process.

    Raises:
        HvdlmError: it is.
    """
    options, keras = config.communication, sys.modules.get("keras")
    compressed = options.auto or (options.compression.algorithm, options.exchange) != ("none", "all_reduce")
    compressed = compressed or config.parallel.zero_gather in ("bf16", "int8") or config.parallel.data_per_node > 1
    wanted = os.environ.get("KERAS_BACKEND")
    if keras is None or not (compressed or config.train.optimizer not in OPTIMIZER_STATE):
        return
    if wanted and keras.config.backend() != wanted:
        raise HvdlmError(
            f"keras, which this run uses, was loaded for {keras.config.backend()} in this process and can't change: "
            f"train with framework {config.framework} in another process."
        )


def require(names: Iterable[str]) -> None:
    """Check that every name of ``plugins`` is installed; raise HvdlmError, which names the nearest, where one isn't."""
    known = installed()
    for name in names:
        if name not in known:
            raise HvdlmError(f"plugins: no plugin {name!r} is installed; {nearest(name, known)}")


@overload
def make(manager: pluggy.PluginManager, kind: Literal["framework"], name: str, **arguments: Any) -> Framework: ...
@overload
def make(manager: pluggy.PluginManager, kind: Literal["backend"], name: str, **arguments: Any) -> Backend: ...
@overload
def make(manager: pluggy.PluginManager, kind: Literal["exchange"], name: str, **arguments: Any) -> Exchange: ...
@overload
def make(manager: pluggy.PluginManager, kind: Literal["task"], name: str, **arguments: Any) -> Task: ...
def make(manager: pluggy.PluginManager, kind: str, name: str, **arguments: Any) -> Any:
    """Return what ``hvdlm_make_<kind>`` makes of ``name``.

    Raises:
        HvdlmError: no plugin knows the name, or the library of a framework does not import.
    """
    try:
        made = getattr(manager.hook, f"hvdlm_make_{kind}")(name=name, **arguments)
    except (ImportError, OSError, RuntimeError) as error:  # a missing file; a part of another version; an older CPU
        if kind != "framework":
            raise
        raise HvdlmError(f"framework {name} does not import, repair it: {type(error).__name__}: {error}") from error
    if made is None:
        raise unknown(kind, name)
    return made


def make_exchange(manager: pluggy.PluginManager, config: Config, world: World, group: Group) -> Exchange:
    """Return the exchange that ``config`` names over ``group``, this rank's ranks of the data axis."""
    makers, index = provided(manager, "compressors"), group.ranks.index(world.rank)
    arguments = {"group": group, "config": config, "compressors": makers, "index": index, "subgroup": world.group}
    return make(manager, "exchange", config.communication.exchange, **arguments)


def unknown(kind: str, name: str) -> HvdlmError:
    """Return the error about a name that no plugin provides."""
    return HvdlmError(f"{kind}: no plugin provides {name!r}; {nearest(name, installed())} Or pip install a plugin.")


def provided(manager: pluggy.PluginManager, hook: str, name: str = "", builtin: Collection[str] = ()) -> dict[str, Any]:
    """Return what ``hvdlm_<hook>`` of the plugins returns, by name; raise HvdlmError where two have ``name``."""
    implementations = getattr(manager.hook, f"hvdlm_{hook}").get_hookimpls()
    by_plugin = {implementation.plugin_name: implementation.function() for implementation in implementations}
    _refuse_several(hook, name, ["hvdlm"] * (name in builtin) + [p for p, names in by_plugin.items() if name in names])
    return {key: value for names in by_plugin.values() for key, value in names.items()}


def _refuse_several(kind: str, name: str, providers: Collection[str]) -> None:
    if len(providers) > 1:
        several = " and by ".join(sorted(providers))
        raise HvdlmError(f"{kind}: {name!r} is provided by {several}: rename one of them, or leave its plugin out.")


def find_model(manager: pluggy.PluginManager, name: str) -> ModelMaker:
    """Return the maker of the model ``name``.

    Raises:
        HvdlmError: no registered plugin has it; the sentence names the nearest.
    """
    known = provided(manager, "models", name)
    if name not in known:
        by_plugin = collections("models")
        # ``model.name`` alone loads a plugin that brings a model of its own name.
        alone = [plugin for plugin, names in by_plugin.items() if plugin in names]
        advice = not_loaded("models", name) or nearest(name, {*known, *alone})
        raise HvdlmError(f"model.name: no model {name!r}; {advice}")
    return known[name]


def find_optimizer(manager: pluggy.PluginManager, config: TrainConfig) -> Optimizer | None:
    """Return the plugin's optimizer that ``train.optimizer`` names; None for one that every framework has.

    Raises:
        HvdlmError: nobody has it; the sentence names those there are.
    """
    maker = _provided(manager, "optimizers", "train.optimizer", config.optimizer, OPTIMIZER_STATE)
    return maker(config) if maker else None


def find_schedule(manager: pluggy.PluginManager, config: TrainConfig) -> Callable[[int], float] | None:
    """Return the plugin's schedule that ``train.schedule`` names; None for one of hvdlm.

    Raises:
        HvdlmError: nobody has it; the sentence names those there are.
    """
    maker = _provided(manager, "lr_schedules", "train.schedule", config.schedule, SCHEDULES)
    return maker(config) if maker else None


def _provided(manager: pluggy.PluginManager, hook: str, option: str, name: str, builtin: Collection[str]) -> Any:
    """Return what ``hvdlm_<hook>`` of the registered plugins returns under ``name``; None where it is built in."""
    known = provided(manager, hook, name, builtin)
    if name in builtin:
        return None
    if name not in known:
        installed_names = {name for names in collections(hook).values() for name in names}
        advice = not_loaded(hook, name) or nearest(name, {*builtin, *known, *installed_names})
        raise HvdlmError(f"{option}: no installed plugin provides {name!r}: install it, or choose another; {advice}")
    return known[name]


def not_loaded(hook: str, name: str) -> str | None:
    """Return what to do where an installed plugin that isn't loaded brings ``name`` (hook: models, options, ...)."""
    plugin = next((plugin for plugin, names in collections(hook).items() if name in names), None)
    if plugin is None:
        return None
    return f"the installed plugin {plugin} brings it: add {plugin} to --plugins, for example --plugins '[{plugin}]'."


def collections(hook: str) -> dict[str, list[str]]:
    """Return the names in what ``hvdlm_<hook>`` of every installed plugin returns, by plugin, broken ones left out."""
    names = {}
    for plugin_name, entry in installed().items():
        with contextlib.suppress(Exception):  # a third party's module may fail in any way
            plugin = import_plugin(entry)
            if hasattr(plugin, f"hvdlm_{hook}"):
                names[plugin_name] = list(getattr(plugin, f"hvdlm_{hook}")())
    return names


def probes() -> Mapping[str, Probe]:
    """Return how the installed frameworks are examined, by name (``hvdlm_probes``); broken plugins are left out."""
    known: dict[str, Probe] = {}
    for _, entry in sorted(installed().items(), reverse=True):  # torch, the default, comes first
        with contextlib.suppress(Exception):  # a third party's module may fail in any way
            known.update(getattr(import_plugin(entry), "hvdlm_probes", dict)())
    return known
