"""Early stopping: ``--plugins [early_stopping]`` ends a run whose validation loss improves no more."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    A resumed run continues to count where ``metrics.jsonl`` ends.
    """

    observer = False

    def __init__(self) -> None:
        self._options = EarlyStoppingOptions()
        self._run: RunControl | None = None
        self._best, self._since = math.inf, 0

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
        if not options.min_improvement >= 0:
            raise HvdlmError(f"early_stopping.min_improvement is {options.min_improvement}, expected 0 or more.")
        if not config.train.eval_every:
            raise HvdlmError("early_stopping needs evaluations: set --train.eval_every.")

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any], run: RunControl) -> None:
        """Start to count, after the evaluations before the step that is resumed."""
        self._options = config.own("early_stopping", EarlyStoppingOptions)
        self._best, self._since = math.inf, 0
        self._run = run if world.rank == 0 else None
        if self._run is not None and info["start_step"]:
            for loss in _earlier_losses(Path(config.log.run) / "metrics.jsonl", info["start_step"]):
                self._count(loss)

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count the evaluation, and ask to stop where patience is over."""
        if self._run is None or "val_loss" not in metrics:
            return
        self._count(metrics["val_loss"])
        if self._since >= self._options.patience:
            self._run.stop(
                f"early_stopping: val_loss has not improved on {self._best:.4f} in {self._since} evaluations, up to "
                f"step {step}"
            )

    def _count(self, loss: float) -> None:
        if loss < self._best - self._options.min_improvement or not math.isfinite(self._best):
            self._best, self._since = loss, 0
        else:
            self._since += 1


def _earlier_losses(path: Path, step: int) -> list[float]:
    """Return the validation losses up to ``step``, of every step the last."""
    losses: dict[int, float] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if '"val_loss"' in line:
                    values = untrusted_input.parse_json(line)
                    losses[int(values["step"])] = float(values["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a damaged end of the file: what was read counts
    return [loss for number, loss in sorted(losses.items()) if number <= step]
