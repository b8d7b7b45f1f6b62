"""Tests of every plugin: it loads, its hooks exist, and its models, compressors and options have free names."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pluggy
import pytest
import yaml

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration import schema
from hvdlm.errors import HvdlmError, nearest
from hvdlm.protocols.state_dict import OPTIMIZER_STATE
from hvdlm_testing.checks.harness import location
from hvdlm_testing.plugin_under_test import COLLECTIONS, HOOKS, PluginUnderTest, find
from hvdlm_testing.suite import fail

_VOCAB = 64
# Imports every named plugin in a fork of a process that has imported what all of them import of hvdlm.
_IMPORTED = """
import json, os, sys
from hvdlm import plugins
from hvdlm.config import Config

def imported(name):
    manager = plugins.load([name])
    hook = manager.hook
    hook.hvdlm_options(), hook.hvdlm_models(), hook.hvdlm_compressors(), hook.hvdlm_make_backend(name=name)
    hook.hvdlm_prepare(config=Config(framework=name))
    return sorted({"torch", "tensorflow", "keras", "horovod", "mpi4py"} & set(sys.modules))

for name in sys.argv[1:]:
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            print(json.dumps([name, f"its process ended with code {os.waitstatus_to_exitcode(status)}"]), flush=True)
        continue
    try:
        result = imported(name)
    except BaseException as error:
        result = " ".join(f"{type(error).__name__}: {error}".split())
    print("\\n" + json.dumps([name, result]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="session")
def imported(pytestconfig: pytest.Config) -> dict[str, list[str] | str]:
    """Return, by plugin, which frameworks and transports its import imports, or why it fails in a new process."""
    names = [plugin.name for plugin in pytestconfig.pluginmanager.get_plugin("hvdlm-conformance").plugins]  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, "-c", _IMPORTED, *names], capture_output=True, text=True)
    if done.returncode:
        return dict.fromkeys(names, done.stderr.strip().splitlines()[-1])
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


@pytest.mark.provides("everything")
def test_it_loads(plugin: PluginUnderTest) -> None:
    if plugin.implementation is None:
        fail([f"plugin {plugin.name} ({plugin.entry.value}) does not import: {plugin.error}"])
    targets = [entry.value for entry in entry_points(group="hvdlm") if entry.name == plugin.name]
    if len(set(targets)) > 1:
        fail([f"{len(targets)} installed plugins are named {plugin.name}: {', '.join(targets)}: choose another name."])


@pytest.mark.provides("everything")
def test_its_hooks_are_hooks_of_hvdlm(plugin: PluginUnderTest) -> None:
    faults, known = [], [hook.removeprefix("hvdlm_") for hook in HOOKS]
    manager = plugins.load([])
    for name in plugin.hooks() if plugin.implementation is not None else []:
        function = getattr(plugin.implementation, name)
        if name not in HOOKS:
            faults.append(f"{plugin.name}: there is no hook {name}; {nearest(name.removeprefix('hvdlm_'), known)}")
        elif getattr(function, "hvdlm_impl", None) is None:
            faults.append(f"{plugin.name}: {name} is never called: mark it with @hvdlm.hookimpl.")
    try:
        manager.register(plugin.implementation)
    except Exception as error:  # pluggy's, which names the hook's arguments
        faults.append(f"{plugin.name}: a hook takes an argument that does not exist: {' '.join(str(error).split())}")
    fail(faults)


@pytest.mark.provides("everything")
def test_importing_it_imports_no_framework_and_no_transport(
    plugin: PluginUnderTest, imported: dict[str, list[str] | str]
) -> None:
    libraries = imported[plugin.name]
    if isinstance(libraries, str):
        fail([f"{plugin.name} fails in a new process: {libraries}"])
    elif libraries:
        fail([f"importing {plugin.name} imports {', '.join(libraries)}: import it in the function that needs it."])


@pytest.mark.provides("hvdlm_check")
def test_its_check_refuses_in_a_sentence_or_accepts(plugin: PluginUnderTest) -> None:
    manager = plugins.load([plugin.name, "gpt", "rnn"])
    faults = [_fault_of_check(plugin, manager, name) for name in ("gpt", "rnn")]
    fail([fault for fault in faults if fault])


def _fault_of_check(plugin: PluginUnderTest, manager: pluggy.PluginManager, model: str) -> str:
    config = plugin.run_config()
    config.model.name = model
    config.framework = plugin.name if plugin.provides("hvdlm_make_framework") else config.framework
    spec = plugins.provided(manager, "models")[model](config.model, _VOCAB, config.data.context)
    try:
        manager.hook.hvdlm_check(config=config, spec=spec)
    except HvdlmError as error:
        return "" if str(error).strip() else f"{plugin.name}: hvdlm_check raises an HvdlmError without a sentence."
    except Exception as error:  # a third party's code may raise anything
        return (
            f"{plugin.name}: hvdlm_check fails with the model {model}: {_line(error)} ({location(error)}): "
            "it raises an HvdlmError to refuse settings, and nothing otherwise."
        )
    return ""


@pytest.mark.provides("everything")
def test_collections_have_free_names(plugin: PluginUnderTest) -> None:
    faults = []
    for kind, hook in COLLECTIONS.items():
        if hook not in (plugin.hooks() if plugin.implementation is not None else []):
            continue
        members = getattr(plugin.implementation, hook)()
        if not isinstance(members, dict) or not all(isinstance(k, str) and v is not None for k, v in members.items()):
            faults.append(f"{plugin.name}: {hook} returns {type(members).__name__}, expected {{name: maker}}.")
            continue
        for name in set(members) & _taken(kind, plugin):
            faults.append(f"{plugin.name}: the name {name} of its {kind} is taken by hvdlm: choose another.")
    fail(faults)


def _taken(kind: str, plugin: PluginUnderTest) -> set[str]:
    """Return the names that hvdlm's own plugins use, except for the tested one."""
    entries = [entry for entry in entry_points(group="hvdlm") if entry.dist and entry.dist.name == "hvdlm"]
    others = find([entry.name for entry in entries if entry.name != plugin.name], [])
    built_in = {"optimizers": OPTIMIZER_STATE, "lr_schedules": plugins.SCHEDULES}
    return {name for other in others for name in other.members(kind)} | set(built_in.get(kind, ()))


@pytest.mark.provides("hvdlm_schedulers")
def test_schedulers_write_job_files(plugin: PluginUnderTest) -> None:
    faults = []
    for name, scheduler in plugin.members("schedulers").items():
        client = getattr(scheduler, "CLIENT", None)
        if isinstance(client, str) or not client or not all(isinstance(word, str) for word in client):
            faults.append(f"scheduler {name}: CLIENT is {client!r}, expected the words of a command.")
        if not callable(getattr(scheduler, "write", None)):
            faults.append(f"scheduler {name}: there is no function write(job, arguments, config).")
    fail(faults)


@pytest.mark.provides("hvdlm_peak_flops")
def test_the_peak_of_an_unknown_device_is_none(plugin: PluginUnderTest) -> None:
    hook = plugins.load([plugin.name]).hook.hvdlm_peak_flops
    for name, precision in (("no device of this name", "bf16"), ("", "fp32")):
        if hook(name=name, precision=precision) is not None:
            fail([f"{plugin.name}: hvdlm_peak_flops returns a peak for the device {name!r}: return None unless known."])


@pytest.mark.provides("hvdlm_options")
def test_options_have_defaults_types_and_help(plugin: PluginUnderTest) -> None:
    faults = []
    for section, kind in plugin.implementation.hvdlm_options().items():
        if section in Config.__dataclass_fields__:
            faults.append(f"{plugin.name}: the section {section} of its options is hvdlm's own: choose another.")
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            faults.append(f"{plugin.name}: the options of section {section} are {kind!r}, expected a dataclass.")
            continue
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                faults.append(f"--{section}.{field.name} has no default: a run that doesn't set it could not start.")
            if not re.search(rf"^\s+{field.name}: \S", kind.__doc__ or "", re.M):
                faults.append(f"--{section}.{field.name} has no help: give it a line under Args: in the docstring.")
        for key, hint in schema.types_of({section: kind}).items():
            if schema.expectation(hint) == "another value":
                faults.append(f"--{key} has a type that the command line does not support: {hint}.")
    fail(faults)


@pytest.mark.provides("hvdlm_options")
def test_options_are_read_back_from_config_yaml(plugin: PluginUnderTest, tmp_path: Path) -> None:
    try:
        config = plugin.run_config()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        read_back = plugin.run_config("--config", str(tmp_path / "config.yaml"))
    except Exception as error:
        fail([f"{plugin.name}: its options can't be parsed, or can't be read back from config.yaml: {_line(error)}"])
        return
    sections: dict[str, Any] = plugin.implementation.hvdlm_options()
    for section in sections:
        before, after = (c.plugin_options.get(section) for c in (config, read_back))
        if before != after or before is None:
            fail(
                [f"{plugin.name}: config.plugin_options[{section!r}] is {before}, read back from config.yaml {after}."]
            )


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
