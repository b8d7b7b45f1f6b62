"""The GPU kit's speed case: hvdlm's whole loop and a plain loop of the same model in turns, in one process.

Both train GPT-2 from the same initial weights, on the same tokens. After a block of steps of hvdlm, the plain loop does
as many; the device has finished a block's work before its time is taken. The peak of memory of each is that during its
own blocks, without what the other keeps between them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from harness import emit
from plain_gpt import PlainLoop, Settings, Sizes

from hvdlm import Config, hookimpl, telemetry
from hvdlm.training import loop, run
from hvdlm.training.signals import Signals

FULL: dict[str, Any] = {"rounds": 9, "tokens": 240_000, "warm": 5, "sizes": Sizes()}  # tokens: of a block
SHORT: dict[str, Any] = {"rounds": 2, "tokens": 1_000, "warm": 2, "sizes": Sizes(2, 64, 2, 64, 192)}
LOSS_TOLERANCE = 0.05  # of the two models' first losses, in bf16


def options(case: gpu_cases.SpeedCase, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return hvdlm's options; those of speed are its defaults in the variant ``default``."""
    model = {"layers": sizes.layers, "width": sizes.width, "heads": sizes.heads, "vocab": sizes.vocab, "bias": False}
    chosen: dict[str, Any] = {}
    if case.variant != "default":
        chosen = {"train.precision": "bf16", "train.compile": case.variant == "compiled"}
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **chosen,
        "data.context": sizes.context,
        "train.batch_size": case.rows,
        "train.steps": 10**6,
        "train.beta2": 0.95,
        "train.eval_every": 0,
        "train.replica_check_every": 0,
        "checkpoint.every": 0,
        "log.run": str(folder / "run"),
        "log.overwrite": True,
        "log.tensorboard": False,
    }


class Memory:
    """Bytes allocated on the GPU; on a CPU, None."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()

    def now(self) -> int:
        """Wait for the device; return the bytes that are allocated."""
        if not self._gpu:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def start(self) -> None:
        """Start to look for the peak."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return the peak since ``start``."""
        return torch.cuda.max_memory_allocated() if self._gpu else 0


class Turns:
    """Event plugin that gives the plain loop its turns, and ends the process after the last one.

    ``built``: bytes on the GPU that the plain loop took before its first step.
    """

    def __init__(self, opened: run.Run, plain: PlainLoop, case: gpu_cases.SpeedCase, o: dict[str, Any], built: int):
        self._opened = opened
        self._plain = plain
        self._case = case
        self._o = o
        self._block = max(2, round(o["tokens"] / (case.rows * o["sizes"].context)))
        self._memory = Memory()
        self._kept = {"hvdlm": 0, "plain": built}  # between blocks
        self._peaks = {"hvdlm": 0, "plain": 0}
        self._rounds: list[tuple[float, float]] = []
        self._began = 0.0
        self._peak_speed: float | None = None

    # Last of all plugins, so that the time of the others counts as hvdlm's.
    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step: int, rates: Any) -> None:
        """Take a turn after the first steps, which compile, and then after each block."""
        if step < self._o["warm"] or (step - self._o["warm"]) % self._block:
            return
        held = self._memory.now()
        ended = time.perf_counter()
        self._peak_speed = rates.peak_tokens_per_second
        if not self._began:
            self._warm_up(held)
        else:
            self._peaks["hvdlm"] = max(self._peaks["hvdlm"], self._memory.peak() - self._kept["plain"])
            self._rounds.append((ended - self._began, self._turn()))
        if len(self._rounds) == self._o["rounds"]:
            emit("end", {"name": self._case.name, **self._values()})
            sys.stdout.flush()
            os._exit(0)  # without an evaluation and a checkpoint
        self._memory.start()
        self._began = time.perf_counter()

    def _warm_up(self, held: int) -> None:
        """Let the plain loop compile and allocate; note what each keeps between blocks."""
        self._kept["hvdlm"] = held - self._kept["plain"]
        for _ in range(self._o["warm"]):
            self._plain.step()
        self._kept["plain"] += self._memory.now() - held

    def _turn(self) -> float:
        """Let the plain loop do a block; return its seconds."""
        self._memory.start()
        began = time.perf_counter()
        for _ in range(self._block):
            self._plain.step()
        self._memory.now()
        seconds = time.perf_counter() - began
        self._peaks["plain"] = max(self._peaks["plain"], self._memory.peak() - self._kept["hvdlm"])
        return seconds

    def _values(self) -> dict[str, Any]:
        tokens = self._block * self._case.rows * self._o["sizes"].context
        ratios = sorted(plain / own for own, plain in self._rounds)
        own, plain = (tokens / statistics.median(seconds) for seconds in zip(*self._rounds, strict=True))
        gpu = torch.cuda.is_available()
        resolved = self._opened.resolved
        return {
            "hvdlm_speed": own,
            "plain_speed": plain,
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "mfu": own / self._peak_speed if self._peak_speed else None,
            "hvdlm_memory": self._peaks["hvdlm"] if gpu else None,
            "plain_memory": self._peaks["plain"] if gpu else None,
            "plain": "compiled" if self._plain.settings.compiled else "eager",
            "precision": self._opened.config.train.precision,
            "compiled": bool(resolved.compile),
            "notes": list(resolved.notes),
            "rounds": self._rounds,
        }


def check_same_model(opened: run.Run, plain: PlainLoop) -> None:
    """Raise RuntimeError where the two compute different losses of the same batch with the same weights."""
    plain.model.copy_from({p.name: p.initial(opened.config.train.seed) for p in opened.spec.params})
    batch = opened.task.rows(*opened.rows)
    total, tokens = opened.trainable.eval_step(batch)
    with torch.no_grad():
        loss = plain.loss(plain.move(batch.inputs.astype("int64")), plain.move(batch.targets.astype("int64"))).item()
    if not abs(loss - total / tokens) < LOSS_TOLERANCE:
        raise RuntimeError(f"the loops have different models: hvdlm's loss is {total / tokens}, the other's {loss}")


def main() -> None:
    """Train in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    o = SHORT if arguments.short else FULL
    case = next(case for case in gpu_cases.SPEED if case.name == arguments.case)
    emit("begin", case.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config.load(options(case, o["sizes"], arguments.folder))
    opened = run.start(run.plan(config))
    before = Memory().now()
    # Beside hvdlm's default options, the plain loop is as fast as it can be: bf16 on GPUs, compiled.
    compiled = case.variant == "compiled" or (case.variant == "default" and device == "cuda")
    settings = Settings(rows=case.rows, compiled=compiled, bf16=opened.config.train.precision == "bf16")
    plain = PlainLoop(o["sizes"], settings, opened.task.data.train, device)
    built = Memory().now() - before
    check_same_model(opened, plain)
    turns = Turns(opened, plain, case, o, built)
    for plugin in (*telemetry.default_plugins(opened.config), turns):
        opened.manager.register(plugin)
    loop.train(opened, Signals(0))


if __name__ == "__main__":
    main()
