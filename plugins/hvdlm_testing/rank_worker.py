"""The program that ``hvdlm_testing.launcher`` starts on every rank: all ranks make the same checks in one order."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from hvdlm.configuration.availability import choose_backend
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io.launcher_env import rank_for_messages
from hvdlm_testing.checks import backends, compressors, exchanges, models, optimizers, runs
from hvdlm_testing.checks.harness import Findings, Harness, Skip, location
from hvdlm_testing.launcher import RANKS, RUNS, Report, Request, Result, read_reports
from hvdlm_testing.plugin_under_test import PluginUnderTest, find, starter_of

_REPORT_SECONDS = 2.0  # in which other ranks may report the same error: then none waits in a collective
_CHECKS = {
    "models": models.check_model,
    "compressors": compressors.check_compressor,
    "optimizers": optimizers.check_optimizer,
    "exchange": exchanges.check_exchange,
    "framework": models.check_framework,
    "backend": backends.check_backend,
    "framework_run": runs.check_framework_run,
    "task_run": runs.check_task_run,
}


def main(path: str) -> int:
    """Make all checks of the ``Request`` in the file ``path``; rank 0 writes the results."""
    request = Request(**json.loads(Path(path).read_text()))
    starter = starter_of(request.backend)
    return max(starter.run_ranks(RANKS, lambda: _work(request))) if starter else _work(request)


def _work(request: Request) -> int:
    """Make all checks on this rank; return its exit code."""
    output = Path(request.output)
    names = list(dict.fromkeys(name for _, name, _ in request.checks))
    tested = find(names, [f"{name}={file}" for name, file in request.configs.items() if name in names])
    plugins = {plugin.name: plugin for plugin in tested}
    backend = request.backend or choose_backend(request.framework)
    stage, check = "does not start", request.checks[0]
    try:
        with Harness.open(request.framework, backend, tested) as harness:
            stage = "fails while its ranks gather their results"
            for check in request.checks:
                kind, name, member = check
                _make(harness, kind, plugins[name], member, output)
            stage = "fails in close() of its world"
    except HvdlmError as error:
        if not request.backend or stage != "does not start":
            raise
        _write(output, request.checks[0], Result(skipped=f"backend {backend} does not start here: {error}"), 0)
    except Exception as error:  # a third party's code may raise anything
        faults = [f"backend {backend} {stage}, with {request.framework}: {_text(error)}"]
        _report(output, rank_for_messages(), check, Report(faults))
        return 1
    return 0


def _make(harness: Harness, kind: str, plugin: PluginUnderTest, member: str, output: Path) -> None:
    """Make a check; rank 0 writes the result of all ranks."""
    check, rank = [kind, plugin.name, member], harness.world.rank
    _write(output, check, Result(skipped="begun"), rank)
    result = _check(harness, kind, plugin, member, output)
    of_ranks = harness.world.gather_objects([result.faults, result.skipped])
    faults = dict.fromkeys(fault for faults, _ in of_ranks for fault in faults)
    skipped = next((reason for _, reason in of_ranks if reason), "")
    _write(output, check, Result(list(faults), skipped, result.figures), rank)


def _check(harness: Harness, kind: str, plugin: PluginUnderTest, member: str, output: Path) -> Result:
    """Return the result of a check on this rank.

    An error in a run ends all ranks, of which others may wait for this one, unless all have raised the same one with
    the same collectives in flight.
    """
    findings = Findings()
    label = f"{kind.replace('_', ' ')} {member or plugin.name}"
    broken = False  # whether the transport may be
    try:
        _CHECKS[kind](harness, plugin, member, findings)
    except Skip as reason:
        return Result(findings.faults, str(reason), findings.figures)
    except (HvdlmError, RankError) as error:
        findings.fault(f"{label} is refused: {error}")
        broken = isinstance(error, RankError)
    except Exception as error:  # a third party's code may raise anything
        findings.fault(f"{label} fails in {harness.framework_name}: {_text(error)}")
    else:
        return Result(findings.faults, "", findings.figures)
    if kind in RUNS:
        world, check = harness.world, [kind, plugin.name, member]
        own = Report(findings.faults, [] if kind == "backend" else sorted(world.recorder.open))
        _report(output, world.rank, check, own)
        if not _all_report(output, world.size, check, own) or broken or kind == "backend":
            world.abort(1)
    return Result(findings.faults, "", findings.figures)


def _text(error: Exception) -> str:
    """Return an error and where it was raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({location(error)})"


def _report(output: Path, rank: int, check: list[str], report: Report) -> None:
    """Write what a rank can't gather any more."""
    with output.with_suffix(f".rank-{rank}").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"check": ":".join(check), **asdict(report)}) + "\n")


def _all_report(output: Path, ranks: int, check: list[str], own: Report) -> bool:
    """Wait until every rank has reported, or for as long as the others may take; return whether all have this report.

    Files, because a rank that has not failed may wait in a collective.
    """
    deadline = time.monotonic() + _REPORT_SECONDS
    while len(reports := read_reports(output, check)) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)
    return reports == [own] * ranks


def _write(output: Path, check: list[str], result: Result, rank: int) -> None:
    if rank == 0:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": ":".join(check), **asdict(result)}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
