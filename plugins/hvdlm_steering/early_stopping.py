"""Early stopping: ``--plugins [early_stopping]`` ends a run whose validation loss improves no more."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl


@dataclass
class EarlyStoppingOptions:
    """Early stopping.

    Args:
        patience: evaluations in a row without improvement after which the run ends
        min_improvement: decrease of val_loss (nats per token) that counts as an improvement
    """

    patience: int = 3
    min_improvement: float = 0.0


class EarlyStopping:
    """Counts the evaluations since the last improvement, on rank 0; all ranks agree to stop.

    A resumed run continues to count where ``metrics.jsonl`` ends, that of the checkpoint's run; a rollback takes back
    the evaluations after the checkpoint.
    """

    observer = False

    def __init__(self) -> None:
        self._options = EarlyStoppingOptions()
        self._run: RunControl | None = None
        self._losses: dict[int, float] = {}  # by step

    @hookimpl
    def hvdlm_options(self) -> Mapping[str, type]:
        """Return the options of the section early_stopping."""
        return {"early_stopping": EarlyStoppingOptions}

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Check the ranges, and that the run evaluates."""
        options = config.own("early_stopping", EarlyStoppingOptions)
        if options.patience < 1:
            raise HvdlmError(f"early_stopping.patience is {options.patience}, expected 1 or more.")
        if not 0 <= options.min_improvement < math.inf:
            raise HvdlmError(f"early_stopping.min_improvement is {options.min_improvement}, expected 0 or more.")
        if not config.train.eval_every:
            raise HvdlmError("early_stopping needs evaluations: set --train.eval_every.")

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any], run: RunControl) -> None:
        """Start to count, after the evaluations up to the step that is resumed."""
        self._options = config.own("early_stopping", EarlyStoppingOptions)
        self._run = run if world.rank == 0 else None
        checkpoint = run.opened.checkpoint
        self._losses = _earlier_losses(checkpoint.path, info["start_step"]) if self._run and checkpoint else {}

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count the evaluation, and ask to stop where patience is over.

        Raises:
            HvdlmError: the task's metrics have no val_loss.
        """
        if "val_loss" not in metrics:
            raise HvdlmError("early_stopping compares val_loss, which this task doesn't measure: leave the plugin out.")
        if self._run is None:
            return
        self._losses[step] = metrics["val_loss"]
        best, since = _best_and_since(self._losses, self._options.min_improvement)
        if since >= self._options.patience:
            self._run.stop(
                f"early_stopping: val_loss has not improved on {best:.4f} in {since} evaluations, up to step {step}"
            )

    @hookimpl
    def hvdlm_rolled_back(self, to_step: int) -> None:
        """Forget the evaluations of the steps that were taken back."""
        self._losses = {step: loss for step, loss in self._losses.items() if step <= to_step}


def _best_and_since(losses: Mapping[int, float], min_improvement: float) -> tuple[float, int]:
    """Return the loss of the last improvement, and the number of evaluations since; NaN is none."""
    best, since = math.inf, 0
    for _, loss in sorted(losses.items()):
        improves = loss < best - min_improvement
        best, since = (loss, 0) if improves else (best, since + 1)
    return best, since


def _earlier_losses(checkpoint: Path, step: int) -> dict[int, float]:
    """Return the validation losses up to ``step`` by step, of several of one step the last."""
    losses: dict[int, float] = {}
    # The checkpoint is RUN/checkpoints/STEP, or that of a branch: RUN/checkpoints/BRANCH/STEP.
    files = (parent / "metrics.jsonl" for parent in list(checkpoint.absolute().parents)[1:3])
    for line in _lines(next((path for path in files if path.is_file()), None)):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line: the others count
            values = untrusted_input.parse_json(line)
            loss = values["val_loss"]
            losses[int(values["step"])] = math.nan if loss is None else float(loss)  # JSON has no NaN
    return {number: loss for number, loss in losses.items() if number <= step}


def _lines(path: Path | None) -> Iterator[str]:
    """Yield the lines of evaluations, as far as they can be read."""
    with contextlib.suppress(OSError):
        if path is not None:
            with path.open(encoding="utf-8", errors="replace") as file:
                yield from (line for line in file if '"val_loss"' in line)
