"""Launches ``hvdlm_testing.rank_worker`` on two ranks, once for each framework or backend, and keeps the results."""

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

from hvdlm.configuration.availability import mpi_backend, require_framework
from hvdlm.errors import HvdlmError
from hvdlm_backends.probes import unpinned
from hvdlm_testing.plugin_under_test import PluginUnderTest, frameworks, starter_of

_TIMEOUT = 900  # seconds of a launch
_BACKEND_TIMEOUT = 300  # of one that tests a backend, which may lose a message for which a rank then waits
RANKS = 2
RUNS = ("framework_run", "task_run", "backend")  # checks that an error ends on a rank of which others wait


@dataclass
class Result:
    """The result of one check on all ranks.

    Attributes:
        faults: sentences.
        skipped: why the check was not made; empty if it was.
        figures: numbers, such as losses, to compare with those of other frameworks.
    """

    faults: list[str] = field(default_factory=list)
    skipped: str = ""
    figures: list[float] = field(default_factory=list)


@dataclass
class Report:
    """What a rank writes of an error in a check.

    Attributes:
        faults: sentences.
        in_flight: the sequence numbers of the collectives that it has begun and not ended.
    """

    faults: list[str]
    in_flight: list[int] = field(default_factory=list)


@dataclass
class Request:
    """The checks that a launch makes, written to a file that every rank reads.

    Attributes:
        framework: its name.
        backend: the backend under test; empty where the framework's own is used.
        checks: a list of [kind, plugin, member].
        configs: the YAML files of plugins, by name.
        output: file to which rank 0 writes the results.
    """

    framework: str
    backend: str
    checks: list[list[str]]
    configs: dict[str, str]
    output: str


class Launches:
    """The launches of one run of pytest, each made when its first result is asked for.

    Attributes:
        selected: framework, kind, plugin and member of each check that the selected tests ask for.
    """

    selected: set[tuple[str, str, str, str]]

    def __init__(self, plugins: list[PluginUnderTest]) -> None:
        self._plugins = plugins
        self._results: dict[tuple[str, str], dict[str, Result] | str] = {}
        self.launcher = [] if shutil.which("mpirun") is None else ["mpirun", "--oversubscribe", "--bind-to", "none"]

    def describe(self) -> str:
        """Return a phrase that says how many ranks there are."""
        if self.launcher:
            return f"{RANKS} ranks under mpirun"
        return "one rank only: there is no mpirun on PATH, so that agreement between ranks is not tested"

    def frameworks_of(self, plugin: PluginUnderTest) -> list[str]:
        """Return the frameworks in which a plugin is tested: the one that it provides, and the built-in ones."""
        provided = [plugin.name] if plugin.provides("hvdlm_make_framework") else []
        return list(dict.fromkeys([*provided, *frameworks()]))

    def of(self, framework: str, kind: str, plugin: PluginUnderTest, member: str = "") -> Result:
        """Return the result of a check (``models``, ``exchange``, ...) of a plugin with this framework."""
        concerned = [p for p in self._plugins if framework in self.frameworks_of(p)]
        checks = [list(check) for p in concerned for check in _checks(p) if (framework, *check) in self.selected]
        checks.sort(key=lambda check: check[0] in RUNS)
        request = Request(framework, "", checks, {}, "")
        return self._result(("framework", framework), request, [kind, plugin.name, member])

    def of_backend(self, framework: str, plugin: PluginUnderTest) -> Result:
        """Return the result of the check of a plugin's backend with this framework's tensors."""
        check = ["backend", plugin.name, ""]
        return self._result((framework, plugin.name), Request(framework, plugin.name, [check], {}, ""), check)

    def _result(self, key: tuple[str, str], request: Request, check: list[str]) -> Result:
        if key not in self._results:
            request.configs = {p.name: str(p.config) for p in self._plugins if p.config}
            self._results[key] = self._launch_all(request)
        results = self._results[key]
        if isinstance(results, str):
            return Result([results])
        return results.get(":".join(check)) or Result([f"the ranks ended before the check of {' '.join(check)}"])

    def _launch_all(self, request: Request) -> dict[str, Result] | str:
        """Launch until all checks have been made: an error in one of ``RUNS`` may end the ranks before the next."""
        results: dict[str, Result] = {}
        while request.checks:
            made = self._launch(request)
            if isinstance(made, str):
                return results or made
            results |= made
            pending = [check for check in request.checks if ":".join(check) not in results]
            if len(pending) == len(request.checks):
                break
            request.checks = pending
        return results

    def _launch(self, request: Request) -> dict[str, Result] | str:
        """Return {check: result}, or a sentence if the launch failed without any result."""
        with tempfile.TemporaryDirectory() as folder:
            request.output = str(Path(folder) / "results.jsonl")
            file = Path(folder) / "request.json"
            file.write_text(json.dumps(asdict(request)))
            command = [*self._launcher(request), sys.executable, "-m", "hvdlm_testing.rank_worker", str(file)]
            limit = _BACKEND_TIMEOUT if request.backend else _TIMEOUT
            try:
                done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=limit)
                output, code = done.stdout[-1500:] + done.stderr[-3000:], done.returncode
            except subprocess.TimeoutExpired:
                output, code = f"no result within {limit} s: do all ranks call the same collectives?", 1
            results = _read(Path(request.output))
            if code and not results:
                errors = _errors(request, request.checks[0])
                return "\n".join(errors) or f"{' '.join(command)} failed: {output}"
            for check in request.checks:
                result = results.get(":".join(check))
                if result is not None and result.skipped == "begun":  # ranks ended, or hung, in the middle of it
                    errors = _errors(request, check) or [f"the ranks ended in the middle of it: {output}"]
                    results[":".join(check)] = Result(errors)
                elif result is not None and request.backend and not result.faults:
                    result.faults = _errors(request, check)  # closing the world failed
            return results

    def _launcher(self, request: Request) -> list[str]:
        if request.backend == "gloo" and shutil.which("horovodrun"):
            return ["horovodrun", "--gloo", "-np", str(RANKS)]
        if not self.launcher or request.backend == "local" or starter_of(request.backend):
            return []
        try:
            require_framework(request.framework, RANKS, request.backend or mpi_backend(request.framework))
        except HvdlmError:
            return []
        return [*self.launcher, "-np", str(RANKS)]


def _checks(plugin: PluginUnderTest) -> list[tuple[str, str, str]]:
    """Return (kind, plugin, member) of each check that needs a framework."""
    collections = ("models", "compressors", "optimizers")
    checks = [(kind, plugin.name, member) for kind in collections for member in plugin.members(kind)]
    kinds_of: dict[str, tuple[str, ...]] = {
        "framework": ("framework", "framework_run"),
        "exchange": ("exchange",),
        "task": ("task_run",),
    }
    for made, kinds in kinds_of.items():
        if plugin.provides(f"hvdlm_make_{made}"):
            checks += [(kind, plugin.name, "") for kind in kinds]
    return checks


def _read(path: Path) -> dict[str, Result]:
    """Return the results that rank 0 wrote, one JSON object a line; the last line about a check counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {record.pop("check"): Result(**record) for record in records}


def read_reports(output: Path, check: list[str]) -> list[Report]:
    """Return what ranks have reported of an error in a check."""
    reports = []
    for path in sorted(output.parent.glob(f"{output.stem}.rank-*")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            record = json.loads(line) if line.endswith("\n") else {}  # a rank is writing it
            if record.pop("check", "") == ":".join(check):
                reports.append(Report(**record))
    return reports


def _errors(request: Request, check: list[str]) -> list[str]:
    """Return the faults that ranks have reported of a check, each once."""
    reports = read_reports(Path(request.output), check)
    return list(dict.fromkeys(fault for report in reports for fault in report.faults))


def _environment() -> dict[str, str]:
    """Return this process's environment without variables that set threads or ranks."""
    env = unpinned()
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        env |= {name: os.environ[name]} if name in os.environ else {}
    return env | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
