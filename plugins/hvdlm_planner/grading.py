"""Predicted beside measured seconds of a run's steps, by cause."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.training.run import Run
from hvdlm.training.run_control import RunControl
from hvdlm_planner import grades
from hvdlm_planner.measured_steps import CAUSES, MeasuredSteps, slowest
from hvdlm_planner.run_prediction import RunPrediction, check, predict


def observers(config: Config) -> list[object]:
    """Return the event plugins of every run; the line is printed after the others' (the last is called first)."""
    return [*([StepSecondsLine()] if config.log.progress else []), Grading(config)]


class Grading:
    """Event plugin that adds ``step_seconds`` to the summary, and writes its error beside the hardware file."""

    observer = True

    def __init__(self, config: Config) -> None:
        self._config = config  # of this machine: backend, precision and threads are chosen
        local, compression = config.communication.local, config.communication.compression
        self._steps = MeasuredSteps(max(local.warmup, compression.start_after_steps))
        self._tensor_before = 0.0

    @hookimpl
    def hvdlm_run_started(self, run: RunControl) -> None:
        """Keep the run, of which the prediction is made at its end; check the hardware file that it names.

        Raises:
            HvdlmError: there is none, or it is wrong.
        """
        self._run = run.opened
        check(self._config)

    @hookimpl
    def hvdlm_step_ended(self, result: StepResult, seconds: float) -> None:
        """Add the step."""
        if self._steps.add(result, seconds, self._run.exchange.agreed):
            self._tensor_before = _tensor_seconds(self._run)

    @hookimpl
    def hvdlm_checkpoint_saved(self, seconds: float) -> None:
        """Add the time for which the checkpoint blocked training."""
        self._steps.add_save(seconds)

    @hookimpl(tryfirst=True)
    def hvdlm_run_ended(self, summary: dict[str, Any]) -> None:
        """Add the figures of the slowest rank to the summary, before others read it. All ranks call."""
        own = prediction = None
        try:
            own = self._own_seconds()
            prediction = predict(self._run) if self._run.world.rank == 0 else None
        except HvdlmError as error:  # a damaged file of measurements is no reason for a run to fail
            print(f"hvdlm: the seconds of a step are not predicted: {error}", file=sys.stderr, flush=True)
        finally:  # what fails on one rank must not leave the others waiting
            figures = {"seconds": prediction.seconds, "hardware": prediction.name} if prediction else None
            messages = self._run.world.gather_objects([own, figures])
        summary["step_seconds"] = compare([message[0] for message in messages], messages[0][1], self._steps)
        if prediction:
            self._write_back(summary["step_seconds"], prediction)

    def _write_back(self, figures: Mapping[str, Any], prediction: RunPrediction) -> None:
        if figures["error"] is not None and prediction.error_file is not None:
            grades.write(prediction.error_file, prediction.measurements, figures, self._config.log.run)

    def _own_seconds(self) -> dict[str, float] | None:
        tensor_seconds = _tensor_seconds(self._run) - self._tensor_before
        return self._steps.by_cause(self._config.checkpoint.every, tensor_seconds)


def compare(
    ranks: Sequence[Mapping[str, float] | None], prediction: Mapping[str, Any] | None, steps: MeasuredSteps
) -> dict[str, Any]:
    """Return ``step_seconds`` of summary.json from all ranks' seconds and the prediction, None where there is none.

    ``error``: predicted seconds divided by measured ones, minus 1; None also after fewer steady steps than make it
    reliable.
    """
    rank = slowest(ranks)
    measured = None if rank is None else ranks[rank]
    predicted = prediction["seconds"] if prediction else None
    error = None
    if measured and predicted and measured["seconds"] > 0 and steps.blocks >= grades.LEAST_BLOCKS:
        error = predicted["seconds"] / measured["seconds"] - 1
    return {
        "measured": measured,
        "predicted": predicted,
        "error": error,
        "hardware": prediction["hardware"] if prediction else None,
        "rank": rank,
        "steps": steps.steady,
    }


class StepSecondsLine:
    """Event plugin that prints the predicted and the measured seconds of a step, in the last line of the log."""

    observer = True

    def __init__(self) -> None:
        self._rank = 0

    @hookimpl
    def hvdlm_run_started(self, world: World) -> None:
        """Keep the rank: one rank prints."""
        self._rank = world.rank

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Print the line, where there is a prediction."""
        figures = summary.get("step_seconds") or {}
        if self._rank == 0 and figures.get("measured") and figures.get("predicted"):
            print(line(figures), flush=True)


def line(figures: Mapping[str, Any]) -> str:
    """Return ``step_seconds`` of a summary as a line, for example "a step took 152 ms (predicted 148 ms, ...": ..."""
    measured, predicted = figures["measured"], figures["predicted"]
    error = "" if figures["error"] is None else f", {grades.deviation(figures['error'])}"
    causes = ", ".join(f"{cause} {_short(measured[cause])} ({_short(predicted[cause])})" for cause in CAUSES)
    total = f"a step took {_short(measured['seconds'])} (predicted {_short(predicted['seconds'])}{error})"
    return f"{total}: {causes}; by {figures['hardware']}"


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _tensor_seconds(run: Run) -> float:
    """Return the seconds for which this rank has waited for collectives of the tensor axis, which steps leave out."""
    return sum(entry.seconds for key, entry in run.trainable.traffic().items() if key.startswith("tensor/"))
