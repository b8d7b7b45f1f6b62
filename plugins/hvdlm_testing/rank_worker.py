"""What ``conformance.launching`` starts on every rank: looks at one thing after the other, all ranks alike."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from hvdlm_testing.checks import backends, compressors, exchanges, models, tasks
from hvdlm_testing.checks.harness import Checked, Skip, Stage
from hvdlm_testing.launcher import Found, Order
from hvdlm_testing.plugin_under_test import Subject, find

from hvdlm.configuration.availability import choose_backend
from hvdlm.errors import HvdlmError, RankError

_CHECKS = {
    "models": models.check_model,
    "compressors": compressors.check_compressor,
    "exchange": exchanges.check_exchange,
    "framework": models.check_framework,
    "task": tasks.check_task,
}


def main(path: str) -> int:
    """Look at all that the order in ``path`` names; rank 0 writes what was found."""
    order = Order(**json.loads(Path(path).read_text()))
    output = Path(order.output)
    names = list(dict.fromkeys(name for _, name, _ in order.things))
    known = find(names, [f"{name}={file}" for name, file in order.configs.items() if name in names])
    subjects = {subject.name: subject for subject in known}
    if order.backend:
        thing = order.things[0]
        _write(output, thing, backends.check_backend(subjects[order.backend], order.framework), 0)
        return 0
    with Stage.open(order.framework, choose_backend(order.framework), known) as stage:
        for kind, name, member in order.things:
            _write(output, [kind, name, member], Found(skipped="begun"), stage.world.rank)
            found = _look(stage, kind, subjects[name], member)
            everyone = stage.world.gather_objects([found.faults, found.skipped])
            faults = dict.fromkeys(fault for faults, _ in everyone for fault in faults)
            skipped = next((reason for _, reason in everyone if reason), "")
            _write(output, [kind, name, member], Found(list(faults), skipped, found.figures), stage.world.rank)
    return 0


def _look(stage: Stage, kind: str, subject: Subject, member: str) -> Found:
    checked = Checked()
    try:
        _CHECKS[kind](stage, subject, member, checked)
    except Skip as reason:
        return Found(checked.faults, str(reason), checked.figures)
    except (HvdlmError, RankError) as error:
        checked.fault(f"{kind} {member or subject.name} is refused: {error}")
    except Exception as error:  # a third party's code may raise anything
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        checked.fault(
            f"{kind} {member or subject.name} fails in {stage.framework_name}: {type(error).__name__}: {error} "
            f"({where.filename}:{where.lineno})"
        )
    return Found(checked.faults, "", checked.figures)


def _write(output: Path, thing: list[str], found: Found, rank: int) -> None:
    if rank == 0:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"thing": ":".join(thing), **asdict(found)}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
