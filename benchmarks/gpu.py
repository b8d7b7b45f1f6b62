"""Speed and correctness on one machine with a GPU, in calls of a few minutes; ``benchmarks/gpu.sh`` starts it.

    benchmarks/gpu.sh all [--limit 480]     everything, in order of priority
    benchmarks/gpu.sh speed|check|table     tokens/s beside a plain loop of the same model; two ranks beside one; tables

The results are written after each case (``--results``, default build/gpu-results). A call stops before ``--limit``
seconds are over, and the next one continues where it stopped. The exit code is 0 when nothing is left to be run, 75
when another call is needed, 1 when a case of the correctness matrix failed or missed its bar. Without a GPU, all but
NCCL runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_launch
import gpu_results
from gpu_cases import Case, Launch
from gpu_results import Results
from harness import FOLDER

AGAIN = 75  # exit code where cases are left, as of runs that are to be resumed
RESERVE = 5.0  # seconds kept for ending a launch and printing the tables
UNTRIED = "not tried, since others of its launch failed"
HOPELESS = 2  # failed cases of a launch without any that succeeded, after which its others are not tried


def facts() -> dict[str, Any]:
    """Return the device, the versions and the date."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    versions = f"PyTorch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if gpu else "")
    built = Path(sys.prefix) / "horovod-built.json"  # of gpu_build.py
    return {
        "device": device,
        "gpus": torch.cuda.device_count(),
        "versions": versions,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "build_seconds": json.loads(built.read_text())["seconds"] if built.exists() else None,
    }


class Kit:
    """One call: runs what is pending until the limit."""

    def __init__(self, results: Results, short: bool, ends: float, folder: Path) -> None:
        self._results = results
        self._short = short
        self._ends = ends
        self._folder = folder

    def left(self) -> float:
        """Return the seconds that launches may still take."""
        return self._ends - time.monotonic() - RESERVE

    def run(self, launches: list[Launch]) -> bool:
        """Run the pending cases; return whether none is left.

        A launch that ends early is started again with the cases that it has not done. One that can hardly do a case in
        the time that is left gives way to a shorter one.
        """
        while pending := self._results.pending(launches):
            fitting = [one for one in pending if self.left() >= one[0].deadline / (20 if self._short else 3)]
            if not fitting:
                return False
            launch, cases = fitting[0]
            print(f"{launch.name}: {len(cases)} case(s), {self.left():.0f} s left", flush=True)
            runner = self._killed if launch.kind == "killed" else self._together
            if not runner(launch, cases):
                return False
        return True

    def _start(self, script: str, launch: Launch, options: list[str]) -> gpu_launch.Started:
        return gpu_launch.start(script, launch, options, self._results.folder / "logs")

    def _together(self, launch: Launch, cases: tuple[Case, ...]) -> bool:
        """Run the cases in one launch; return False where the limit ended it."""
        script = "gpu_speed_worker.py" if launch.kind == "speed" else "gpu_worker.py"
        started = self._start(script, launch, self._options(launch, cases))
        waiting = [case.name for case in cases]
        for values in gpu_launch.results(started, launch.deadline, self.left):
            waiting.remove(values["name"])
            self._add(values)
        if waiting and not started.limited:
            # The case under way has failed; those after it have not begun.
            self._add({"name": waiting.pop(0), "error": started.error or "the launch ended without a result"})
            names = [case.name for case in launch.cases]
            tried = [name for name in names if name in self._results.cases]
            if len(tried) >= HOPELESS and not any(self._results.values(name) for name in tried):
                for name in names:
                    self._results.give_up(name, self._results.cases.get(name, {}).get("error", UNTRIED))
        return not started.limited

    def _killed(self, launch: Launch, cases: tuple[Case, ...]) -> bool:
        """Let a rank be killed, then resume on one rank."""
        (case,) = cases
        began = time.monotonic()
        first = self._start("gpu_worker.py", launch, [*self._options(launch, cases), "--kill"])
        done = list(gpu_launch.results(first, launch.deadline, self.left))
        if first.limited:
            return False
        if done or not first.error:
            self._add({"name": case.name, "error": "the run ended although a rank was killed"})
            return True
        alone = Launch(launch.name, launch.kind, 1, "local", cases)
        second = self._start("gpu_worker.py", alone, [*self._options(alone, cases), "--resume"])
        for values in gpu_launch.results(second, launch.deadline, self.left):
            self._add(_resumed(values, self._short) | {"seconds": time.monotonic() - began})
        if second.error and not second.limited:
            self._add({"name": case.name, "error": f"resuming: {second.error} (killed: {first.error})"})
        return not second.limited

    def _options(self, launch: Launch, cases: tuple[Case, ...]) -> list[str]:
        short = ["--short"] if self._short else []
        if launch.kind == "speed":
            return ["--case", cases[0].name, "--folder", str(self._folder), *short]
        names = json.dumps([case.name for case in cases])
        return ["--backend", launch.backend, "--cases", names, "--folder", str(self._folder), *short]

    def _add(self, values: dict[str, Any]) -> None:
        name = values.pop("name")
        self._results.add(name, **values)
        outcome = values.get("error", "done")
        print(f"  {name}: {outcome}", flush=True)


def _resumed(values: dict[str, Any], short: bool) -> dict[str, Any]:
    """Return the values of a resumed run with only the losses after the checkpoint that it resumed from."""
    first = gpu_cases.resumed_step(short)
    return values | {"losses": values["losses"][first:], "first_step": first}


def backends(gpus: int) -> list[str]:
    """Return the backends to check: NCCL needs a GPU."""
    return [name for name in gpu_cases.BACKENDS if gpus or name != "nccl"]


def main(arguments: list[str] | None = None) -> int:
    """Run what is left, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["all", "speed", "check", "table"])
    parser.add_argument("--limit", type=float, default=480, help="seconds after which the call has ended")
    parser.add_argument("--results", type=Path, default=FOLDER.parent / "build" / "gpu-results", help="folder")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results")
    parser.add_argument("--backends", nargs="+", choices=gpu_cases.BACKENDS, help="default: all that can run here")
    parser.add_argument("--short", action="store_true", help="the same with tiny sizes; nothing is compiled")
    o = parser.parse_args(arguments)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))  # ends launches on the way out
    if o.fresh and o.action != "table":
        shutil.rmtree(o.results, ignore_errors=True)
    results = Results(o.results)
    here = results.machine if o.action == "table" else facts()
    launches = gpu_cases.plan("all" if o.action == "table" else o.action, o.backends or backends(here["gpus"]), o.short)
    finished = not results.pending(launches)
    if o.action != "table":
        results.machine |= here
        results.write()
        with tempfile.TemporaryDirectory(prefix="hvdlm-gpu-") as folder:
            finished = Kit(results, o.short, began + o.limit, Path(folder)).run(launches)
    print("\n" + gpu_results.tables(results, launches), flush=True)
    (o.results / "table.md").write_text(gpu_results.tables(results, launches), encoding="utf-8")
    return ending(results, launches, finished, o.action)


def ending(results: Results, launches: list[Launch], finished: bool, action: str) -> int:
    """Say what comes next; return the exit code."""
    count = sum(len(launch.cases) for launch in launches)
    known = sum(case.name in results.cases for launch in launches for case in launch.cases)
    bad = gpu_results.missed(results, launches)
    if not finished:
        print(f"{known} of {count} cases are done; next: benchmarks/gpu.sh {action}", flush=True)
        return AGAIN
    print(f"{known} of {count} cases are done" + (f", {len(bad)} failed or missed their bar" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
