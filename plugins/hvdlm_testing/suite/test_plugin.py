"""Every plugin: it loads, its hooks are hooks, and what it brings has names of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from hvdlm_testing.plugin_under_test import COLLECTIONS, HOOKS, Subject, find

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.configuration import schema
from hvdlm.conformance.suite import fail
from hvdlm.errors import nearest
from hvdlm.models.spec import builtin_models

_LOOKS = """
import json, os, sys
from hvdlm import plugins
from hvdlm.config import Config
manager = plugins.load([{name!r}])
hook, known = manager.hook, dict(os.environ)
hook.hvdlm_options(), hook.hvdlm_models(), hook.hvdlm_compressors(), hook.hvdlm_make_backend(name={name!r})
hook.hvdlm_prepare(config=Config(framework={name!r}))
print(json.dumps(sorted({{"torch", "tensorflow", "keras", "horovod", "mpi4py"}} & set(sys.modules))))
"""


@pytest.mark.provides("everything")
def test_it_loads(subject: Subject) -> None:
    if subject.plugin is None:
        fail([f"plugin {subject.name} ({subject.entry.value}) does not import: {subject.error}"])
    twice = [entry.value for entry in entry_points(group="hvdlm") if entry.name == subject.name]
    if len(set(twice)) > 1:
        fail([f"{len(twice)} installed plugins are called {subject.name}: {', '.join(twice)}: choose another name."])


@pytest.mark.provides("everything")
def test_its_hooks_are_hooks_of_hvdlm(subject: Subject) -> None:
    faults, known = [], [hook.removeprefix("hvdlm_") for hook in HOOKS]
    manager = plugins.load([])
    for name in subject.hooks() if subject.plugin is not None else []:
        function = getattr(subject.plugin, name)
        if name not in HOOKS:
            faults.append(f"{subject.name}: there is no hook {name}; {nearest(name.removeprefix('hvdlm_'), known)}")
        elif getattr(function, "hvdlm_impl", None) is None:
            faults.append(f"{subject.name}: {name} is never called: mark it with @hvdlm.hookimpl.")
    try:
        manager.register(subject.plugin)
    except Exception as error:  # pluggy's own, with the arguments that are there
        faults.append(f"{subject.name}: a hook takes an argument that isn't there: {' '.join(str(error).split())}")
    fail(faults)


@pytest.mark.provides("everything")
def test_importing_it_imports_no_framework_and_no_transport(subject: Subject) -> None:
    code = _LOOKS.format(name=subject.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        fail([f"{subject.name} fails in a process of its own: {done.stderr.strip().splitlines()[-1]}"])
    found = json.loads(done.stdout.splitlines()[-1])
    if found:
        fail([f"importing {subject.name} imports {', '.join(found)}: import it in the function that needs it."])


@pytest.mark.provides("everything")
def test_collections_have_names_of_their_own(subject: Subject) -> None:
    faults = []
    for kind, hook in COLLECTIONS.items():
        if hook not in (subject.hooks() if subject.plugin is not None else []):
            continue
        found = getattr(subject.plugin, hook)()
        if not isinstance(found, dict) or not all(isinstance(k, str) and v is not None for k, v in found.items()):
            faults.append(f"{subject.name}: {hook} returns {type(found).__name__}, expected {{name: maker}}.")
            continue
        for name in set(found) & _taken(kind, subject):
            faults.append(f"{subject.name}: the name {name} of its {kind} is taken: hvdlm has one of that name.")
    fail(faults)


def _taken(kind: str, subject: Subject) -> set[str]:
    """Return the names that hvdlm's own plugins use, but for this one."""
    own = [e.name for e in entry_points(group="hvdlm") if e.dist and e.dist.name == "hvdlm" and e.name != subject.name]
    names = {name for other in find(own, []) for name in other.members(kind)}
    return names | (set(builtin_models()) if kind == "models" else set())


@pytest.mark.provides("hvdlm_schedulers")
def test_schedulers_write_job_files(subject: Subject) -> None:
    faults = []
    for name, scheduler in subject.members("schedulers").items():
        client = getattr(scheduler, "CLIENT", None)
        if isinstance(client, str) or not client or not all(isinstance(word, str) for word in client):
            faults.append(f"scheduler {name}: CLIENT is {client!r}, expected the words of a command.")
        if not callable(getattr(scheduler, "write", None)):
            faults.append(f"scheduler {name}: it has no function write(job, arguments, config).")
    fail(faults)


@pytest.mark.provides("hvdlm_options")
def test_options_have_defaults_types_and_help(subject: Subject) -> None:
    faults, found = [], subject.plugin.hvdlm_options()
    for section, kind in found.items():
        if section in Config.__dataclass_fields__:
            faults.append(f"{subject.name}: the section {section} of its options is hvdlm's own: choose another.")
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            faults.append(f"{subject.name}: the options of section {section} are {kind!r}, expected a dataclass.")
            continue
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                faults.append(f"--{section}.{field.name} has no default: a run that doesn't set it could not start.")
            if not re.search(rf"^\s+{field.name}: \S", kind.__doc__ or "", re.M):
                faults.append(f"--{section}.{field.name} has no help: give it a line under Args: in the docstring.")
        for key, hint in schema.types_of({section: kind}).items():
            if schema.expectation(hint) == "another value":
                faults.append(f"--{key} has a type that the command line can't take: {hint}.")
    fail(faults)


@pytest.mark.provides("hvdlm_options")
def test_options_come_back_from_config_yaml(subject: Subject, tmp_path: Path) -> None:
    try:
        config = subject.run_config()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        again = subject.run_config("--config", str(tmp_path / "config.yaml"))
    except Exception as error:
        fail([f"{subject.name}: its options can't be parsed, or not read back from config.yaml: {_line(error)}"])
        return
    sections: dict[str, Any] = subject.plugin.hvdlm_options()
    for section in sections:
        before, after = (c.plugin_options.get(section) for c in (config, again))
        if before != after or before is None:
            fail([f"{subject.name}: config.plugin_options[{section!r}] is {before}, back from config.yaml {after}."])


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
