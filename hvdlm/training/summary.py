"""What a run tells of itself: at its start, and, in ``summary.json``, at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.parallel.mesh import AXES
from hvdlm.protocols.types import StepResult
from hvdlm.telemetry.rates import Interval
from hvdlm.training.preflight import versions
from hvdlm.training.run import Run


def describe(run: Run, start_step: int) -> dict[str, Any]:
    """Return what ``hvdlm_run_started`` tells."""
    return {
        "parameters": run.spec.parameters,
        "frozen_parameters": run.spec.frozen_parameters,
        "flops_per_token": run.spec.flops_per_token,
        "vocab": run.task.vocab,
        "start_step": start_step,
        "steps": run.config.train.steps,
        "framework": run.config.framework,
        "backend": run.config.backend,
        "versions": versions(run.config.framework),
    }


class Meter:
    """Totals over the steps of this process. The first is left out of rates: frameworks build their graphs in it."""

    def __init__(self, parameters: int) -> None:
        self.bytes = self.steps = self.skipped = 0
        self.last_loss = self.seconds = self.idle = 0.0
        self.axis_bytes: dict[str, int] = {}
        self.rates = Interval(parameters)

    def add(self, result: StepResult, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.skipped += result.skipped
        self.bytes += result.comm_bytes
        self.last_loss = result.loss
        self.axis_bytes = result.axis_bytes
        if self.steps > 1:
            self.seconds += seconds
            self.idle += result.idle_seconds
            self.rates.add(result, seconds)


def summarise(
    run: Run, meter: Meter, metrics: Mapping[str, float], done: int, stopped: str | None = None
) -> dict[str, Any]:
    """Return what ``summary.json`` holds. All ranks call.

    Peak memory is that of the rank with the most; ``ranks`` tells of every rank what it holds and what a step of it
    moved along every axis, each beside what closed forms predict; ``idle_share`` is the mean over ranks. ``steps`` are
    those that have been done, ``stopped`` says why they are fewer than ``train.steps``.
    """
    from hvdlm.telemetry.memory import peak_memory_bytes

    traffic = {key: [entry.calls, entry.bytes, entry.seconds] for key, entry in sorted(run.trainable.traffic().items())}
    predicted = run.manager.hook.hvdlm_predict(config=run.config, spec=run.spec, mesh=run.mesh, rank=run.world.rank)
    own: dict[str, Any] = {"memory": run.trainable.memory(), "step_bytes": meter.axis_bytes}
    if predicted:
        own |= {"predicted_memory": predicted.memory, "predicted_step_bytes": predicted.bytes}
    idle = meter.idle / meter.seconds if meter.seconds else 0.0
    everyone = run.world.gather_objects([meter.bytes, peak_memory_bytes(), traffic, own, idle])
    rates = meter.rates
    return {
        "train_loss": meter.last_loss,
        **metrics,
        "tokens_per_second": rates.tokens_per_second if rates.steps else 0.0,
        "seconds": meter.seconds,
        "steps": done,
        "stopped": stopped,
        "skipped_steps": meter.skipped,
        "world_size": run.world.size,
        "mesh": dict(zip(AXES, run.mesh.shape, strict=True)),
        "framework": run.config.framework,
        "backend": run.config.backend,
        "versions": versions(run.config.framework),
        "parameters": run.spec.parameters,
        "frozen_parameters": run.spec.frozen_parameters,
        "bytes_communicated": sum(part[0] for part in everyone),
        "compression": rates.compression,
        "comm_share": rates.comm_share if rates.steps else 0.0,
        "overlap": rates.overlap,
        "idle_share": sum(part[4] for part in everyone) / len(everyone),
        "predicted_idle_share": predicted.idle_share if predicted else None,
        "traffic": _over_ranks([part[2] for part in everyone]),
        "peak_memory_bytes": max(part[1] for part in everyone),
        "ranks": [part[3] for part in everyone],
    }


def _over_ranks(parts: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the sums over ranks, by ``purpose/operation``."""
    names = sorted({key for part in parts for key in part})
    return {
        key: {
            name: sum(part[key][i] for part in parts if key in part)
            for i, name in enumerate(("calls", "bytes", "seconds"))
        }
        for key in names
    }
