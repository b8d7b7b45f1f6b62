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
    launches = gpu_cases.plan("all", gpu_cases.BACKENDS)
    return next(case for launch in launches for case in launch.cases if case.name == name)


def losses(run: Path) -> dict[int, float]:
    """Return the losses of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def run_folder(case: Case, folder: Path) -> Path:
    """Return the folder of a case's run."""
    return folder / "".join(c if c.isalnum() else "-" for c in case.name)


def train(case: Case, backend: str, folder: Path, short: bool, **more: Any) -> dict[str, Any]:
    """Train a case; return its losses, the first of which is that of the step after ``first_step``."""
    import hvdlm

    run = run_folder(case, folder)
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


def kill_step(short: bool) -> int:
    """Return the step after which the rank is killed: between the second checkpoint and the end."""
    steps = gpu_cases.SHORT_STEPS if short else gpu_cases.STEPS
    return 2 * steps // 3 + steps // 6


def install_killer(step: int, folder: Path) -> None:
    """Let rank 1 end after ``step`` as the kernel would end it; a file says that it got there."""
    from hvdlm import hookimpl, telemetry

    plugins = telemetry.default_plugins

    class Killer:
        @hookimpl
        def hvdlm_step_ended(self, step: int) -> None:
            if step == last and launcher_env.rank_for_messages() == 1:
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    last = step
    telemetry.default_plugins = lambda config: [*plugins(config), Killer()]  # type: ignore[assignment]


def check_killed(run: Path, folder: Path, short: bool) -> None:
    """Raise RuntimeError where no rank was killed, or the run has another checkpoint than the one before it."""
    from hvdlm.checkpoints import discovery

    if not (folder / "killed").exists():
        raise RuntimeError("the launch ended before the step at which a rank was to be killed")
    expected, newest = gpu_cases.resumed_step(short), discovery.newest_step(run)
    step = newest[0] if newest else None
    if step != expected:
        raise RuntimeError(f"the newest checkpoint is that of step {step}, not of {expected}")


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
        os.environ.setdefault("HVDLM_NCCL_SHARED_GPUS", "1")  # ranks may share a GPU, each as a node of its own
    if o.kill:
        (o.folder / "killed").unlink(missing_ok=True)
        install_killer(kill_step(o.short), o.folder)
    for name in json.loads(o.cases):
        case = find(name)
        if rank == 0:
            emit("begin", name)
        if o.resume:
            check_killed(run_folder(case, o.folder), o.folder, o.short)
        values = train(case, o.backend, o.folder, o.short, **({"checkpoint.resume": "auto"} if o.resume else {}))
        if rank == 0:
            emit("end", {"name": name, **values})


if __name__ == "__main__":
    main()
