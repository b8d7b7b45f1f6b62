"""Starts ``hvdlm_testing.rank_worker`` on two ranks, once for a framework or a backend, and keeps what it found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvdlm_testing.plugin_under_test import Subject, frameworks

from hvdlm.configuration.availability import mpi_backend, require_framework
from hvdlm.diagnostics.probes import unpinned
from hvdlm.errors import HvdlmError

_TIMEOUT = 900  # seconds of a launch
RANKS = 2


@dataclass
class Found:
    """What ranks found of one thing: ``faults`` are sentences; ``skipped`` says why it was not looked at."""

    faults: list[str] = field(default_factory=list)
    skipped: str = ""
    figures: list[float] = field(default_factory=list)


@dataclass
class Order:
    """What ranks are to look at, and where they write what they found."""

    framework: str
    backend: str
    things: list[list[str]]
    configs: dict[str, str]
    output: str


class Launches:
    """The launches of one run of pytest, each made when it is first asked for."""

    def __init__(self, subjects: list[Subject]) -> None:
        self._subjects = subjects
        self._done: dict[tuple[str, str], dict[str, Found] | str] = {}
        self.launcher = [] if shutil.which("mpirun") is None else ["mpirun", "--oversubscribe", "--bind-to", "none"]

    def describe(self) -> str:
        """Return how many ranks there are."""
        if self.launcher:
            return f"{RANKS} ranks under mpirun"
        return "one rank only: there is no mpirun on PATH, so that what ranks have to agree on is not tested"

    def frameworks_of(self, subject: Subject) -> list[str]:
        """Return the frameworks in which a plugin is tested: a framework of its own, and those that are built in."""
        own = [subject.name] if subject.provides("hvdlm_make_framework") else []
        return list(dict.fromkeys([*own, *frameworks()]))

    def of(self, framework: str, kind: str, subject: Subject, member: str = "") -> Found:
        """Return what ranks with this framework found of a plugin's ``kind`` (``models``, ``exchange``, ...)."""
        things = [list(thing) for s in self._subjects for thing in _things(s)]
        return self._found(("framework", framework), Order(framework, "", things, {}, ""), [kind, subject.name, member])

    def of_backend(self, framework: str, subject: Subject) -> Found:
        """Return what ranks found of a plugin's backend with this framework's tensors."""
        thing = ["backend", subject.name, ""]
        order = Order(framework, subject.name, [thing], {}, "")
        return self._found((framework, subject.name), order, thing)

    def _found(self, key: tuple[str, str], order: Order, thing: list[str]) -> Found:
        if key not in self._done:
            order.configs = {s.name: str(s.config) for s in self._subjects if s.config}
            self._done[key] = self._launch(order)
        results = self._done[key]
        if isinstance(results, str):
            return Found([results])
        return results.get(":".join(thing)) or Found([f"the ranks ended before they came to {' '.join(thing)}"])

    def _launch(self, order: Order) -> dict[str, Found] | str:
        """Return {thing: what was found}, or a sentence where ranks found nothing."""
        with tempfile.TemporaryDirectory() as folder:
            order.output = str(Path(folder) / "found.json")
            file = Path(folder) / "order.json"
            file.write_text(json.dumps(asdict(order)))
            command = [*self._launcher(order), sys.executable, "-m", "hvdlm_testing.rank_worker", str(file)]
            try:
                done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=_TIMEOUT)
                said, code = done.stdout[-1500:] + done.stderr[-3000:], done.returncode
            except subprocess.TimeoutExpired:
                said, code = f"nothing came for {_TIMEOUT} s: do all ranks call the same collectives?", 1
            found = _read(Path(order.output))
            if code and not found:
                return f"{' '.join(command)} failed: {said}"
            for name, one in found.items():
                if one.skipped == "begun":  # ranks ended, or hung, in the middle of it
                    found[name] = Found([f"the ranks ended in the middle of it: {said}"])
            return found

    def _launcher(self, order: Order) -> list[str]:
        if order.backend == "gloo" and shutil.which("horovodrun"):
            return ["horovodrun", "--gloo", "-np", str(RANKS)]
        if not self.launcher or order.backend == "local":
            return []
        try:
            require_framework(order.framework, RANKS, order.backend or mpi_backend(order.framework))
        except HvdlmError:
            return []
        return [*self.launcher, "-np", str(RANKS)]


def _things(subject: Subject) -> list[tuple[str, str, str]]:
    """Return (kind, plugin, member) of what is looked at with a framework."""
    found = [(kind, subject.name, member) for kind in ("models", "compressors") for member in subject.members(kind)]
    for kind in ("framework", "exchange", "task"):
        if subject.provides(f"hvdlm_make_{kind}"):
            found.append((kind, subject.name, ""))
    return found


def _read(path: Path) -> dict[str, Found]:
    """Return what rank 0 wrote, a JSON object a line; the last word on a thing counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    parsed: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {one.pop("thing"): Found(**one) for one in parsed}


def _environment() -> dict[str, str]:
    """Return this process's environment without what pins threads or ranks."""
    env = unpinned()
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        env |= {name: os.environ[name]} if name in os.environ else {}
    return env | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
