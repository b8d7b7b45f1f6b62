"""The description of a run at its start, and its summary (``summary.json``) at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm.planning.closed_forms import predict_costs
from hvdlm.protocols.trainable import HasDeviceMemory
from hvdlm.protocols.types import StepResult
from hvdlm.telemetry.rates import Rates
from hvdlm.training.preflight import versions
from hvdlm.training.run import Run


def describe(run: Run, start_step: int) -> dict[str, Any]:
    """Return the ``info`` of ``hvdlm_run_started``."""
    return {
        **_identity(run),
        "flops_per_token": run.spec.flops_per_token,
        "vocab": run.task.vocab,
        "start_step": start_step,
        "steps": run.config.train.steps,
    }


def _identity(run: Run) -> dict[str, Any]:
    """Return what is trained, and what computes it."""
    return {
        "framework": run.config.framework,
        "backend": run.config.backend,
        "device": run.resolved.device,
        "precision": run.config.train.precision,
        "compile": run.config.train.compile,
        "versions": versions(run.config.framework),
        "parameters": run.spec.parameters,
        "frozen_parameters": run.spec.frozen_parameters,
    }


def device_memory_peak(run: Run) -> int | None:
    """Return the most bytes of its GPU's memory that this rank's tensors took at once; None: it has no GPU."""
    return run.trainable.device_memory_peak() if isinstance(run.trainable, HasDeviceMemory) else None


def peak_tokens_per_second(run: Run) -> float | None:
    """Return what all ranks' devices together would reach at their peak rate; None: one is unknown. All ranks call."""
    resolved, asked = run.resolved, run.config.train.precision
    precision = "tf32" if asked == "fp32" and resolved.tf32 else asked
    peak = run.manager.hook.hvdlm_peak_flops(name=resolved.device, precision=precision)
    peaks = dict(run.world.gather_objects([resolved.identity, peak]))  # ranks may share a device
    return None if None in peaks.values() else sum(peaks.values()) / run.spec.flops_per_token


class RunTotals:
    """Totals over the steps of this process. All ranks create it.

    The first step is left out of ``steady_rates`` and the totals of seconds: frameworks build their graphs in it.
    """

    def __init__(self, run: Run) -> None:
        self.bytes = self.steps = self.skipped = 0
        self.last_loss = self.seconds = self.idle = 0.0
        self.axis_bytes: dict[str, int] = {}
        self.rates = Rates(4 * run.spec.parameters, peak_tokens_per_second(run))
        self._first = self.rates  # with the first step alone

    def add(self, result: StepResult, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.skipped += result.skipped
        self.bytes += result.comm_bytes
        if not result.empty:
            self.last_loss = result.loss
        self.axis_bytes = result.axis_bytes
        self.rates = self.rates.after(result, seconds)
        if self.steps == 1:
            self._first = self.rates
        else:
            self.seconds += seconds
            self.idle += result.idle_seconds

    @property
    def steady_rates(self) -> Rates:
        """Rates over all steps but the first."""
        return self.rates.since(self._first)


def summarise(
    run: Run, totals: RunTotals, metrics: Mapping[str, float], done: int, stopped: str | None = None
) -> dict[str, Any]:
    """Return the content of ``summary.json``. All ranks call.

    Peaks of memory and the share of waiting for data are maxima over ranks. ``ranks`` has the memory of every rank and
    the bytes of its last step by axis, each beside the closed-form prediction. ``idle_share`` is the mean over ranks,
    ``steps`` the number of steps done, ``stopped`` the reason why they are fewer than ``train.steps``.
    """
    from hvdlm.io.machine import peak_memory_bytes

    traffic = {key: [entry.calls, entry.bytes, entry.seconds] for key, entry in sorted(run.trainable.traffic().items())}
    predicted = predict_costs(run.manager, run.config, run.spec, run.mesh, run.world.rank)
    own_costs: dict[str, Any] = {"memory": run.trainable.memory(), "step_bytes": totals.axis_bytes}
    if predicted:
        own_costs |= {"predicted_memory": predicted.memory, "predicted_step_bytes": predicted.bytes}
    idle = totals.idle / totals.seconds if totals.seconds else 0.0
    rates = totals.steady_rates
    data_share, device_peak = rates.data_share if rates.steps else 0.0, device_memory_peak(run) or 0
    own = [totals.bytes, peak_memory_bytes(), traffic, own_costs, idle, data_share, device_peak]
    rank_bytes, peaks, traffics, costs, idle_shares, data_shares, device_peaks = zip(
        *run.world.gather_objects(own), strict=True
    )
    return {
        "train_loss": totals.last_loss,
        **metrics,
        "tokens_per_second": rates.tokens_per_second if rates.steps else 0.0,
        "seconds": totals.seconds,
        "steps": done,
        "stopped": stopped,
        "skipped_steps": totals.skipped,
        "world_size": run.world.size,
        "mesh": dict(zip(run.mesh.axes, run.mesh.shape, strict=True)),
        **_identity(run),
        "bytes_communicated": sum(rank_bytes),
        "compression": rates.compression,
        "comm_share": rates.comm_share if rates.steps else 0.0,
        "overlap": rates.overlap,
        "idle_share": sum(idle_shares) / len(idle_shares),
        "predicted_idle_share": predicted.idle_share if predicted else None,
        "traffic": _over_ranks(traffics),
        "data_share": max(data_shares),
        "mfu": rates.mfu if rates.steps else None,
        "device_memory_peak": max(device_peaks) or None,
        "peak_memory_bytes": max(peaks),
        "ranks": list(costs),
    }


def _over_ranks(traffics: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the sums over ranks, by ``purpose/operation``."""
    names = sorted({key for traffic in traffics for key in traffic})
    return {
        key: {
            name: sum(traffic[key][i] for traffic in traffics if key in traffic)
            for i, name in enumerate(("calls", "bytes", "seconds"))
        }
        for key in names
    }
