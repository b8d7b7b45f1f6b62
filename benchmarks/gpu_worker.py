"""A rank of the GPU kit's correctness matrix: it trains one case after the other in one process.

Rank 0 emits the name of each case before it, and its losses after it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Case
from harness import emit

from hvdlm.io import launcher_env


def find(name: str) -> Case:
    """Return the case of this name."""
    launches = gpu_cases.plan("check", gpu_cases.BACKENDS)
    return next(case for launch in launches for case in launch.cases if case.name == name)


def losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def train(case: Case, backend: str, folder: Path, short: bool, **more: Any) -> dict[str, Any]:
    """Train a case; return its losses, the first of which is that of the step after ``first_step``."""
    import hvdlm

    run = folder / "".join(c if c.isalnum() else "-" for c in case.name)
    own = {"backend": backend, "log.run": str(run), "log.overwrite": "checkpoint.resume" not in more}
    options = gpu_cases.options(case, short) | own | more
    began = time.perf_counter()
    result = hvdlm.train(hvdlm.Config.load(options))
    seconds = time.perf_counter() - began
    if launcher_env.rank_for_messages():
        return {}
    values = losses(run)
    assert len(values) == options["train.steps"], f"{len(values)} losses of {options['train.steps']} steps"
    return {"losses": [values[step] for step in sorted(values)], "seconds": seconds, "steps": result.steps}


class Killer:
    """Event plugin that ends rank 1 at a step as the kernel would: without a word."""

    def __init__(self, step: int, rank: int) -> None:
        self._step = step
        self._rank = rank

    def install(self) -> None:
        """Register with the next training of this process."""
        from hvdlm import hookimpl, telemetry

        killer, plugins = self, telemetry.default_plugins

        class Hook:
            @hookimpl
            def hvdlm_step_ended(self, step: int) -> None:
                if step == killer._step and killer._rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        telemetry.default_plugins = lambda config: [*plugins(config), Hook()]  # type: ignore[assignment]


def kill_step(short: bool) -> int:
    """Return the step after which the rank is killed: between the second checkpoint and the end."""
    steps = gpu_cases.SHORT_STEPS if short else gpu_cases.STEPS
    return 2 * steps // 3 + steps // 6


def main() -> None:
    """Train the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--cases", required=True, help="JSON list of names")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--kill", action="store_true", help="kill rank 1 on the way")
    parser.add_argument("--resume", action="store_true", help="resume the killed run")
    o = parser.parse_args()
    rank = launcher_env.rank_for_messages()
    if o.backend == "nccl":
        # NCCL refuses two ranks on one GPU of one host, and takes ranks with different ids for different hosts.
        os.environ.setdefault("NCCL_HOSTID", f"rank-{rank}")
    if o.kill:
        Killer(kill_step(o.short), rank).install()
    for name in json.loads(o.cases):
        case = find(name)
        if rank == 0:
            emit("begin", name)
        values = train(case, o.backend, o.folder, o.short, **({"checkpoint.resume": "auto"} if o.resume else {}))
        if rank == 0:
            emit("end", {"name": name, **values})


if __name__ == "__main__":
    main()
