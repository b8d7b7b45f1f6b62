"""Weights & Biases: ``--plugins [wandb]``. Needs wandb, and ``wandb login`` unless the mode is offline."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hvdlm import hookimpl
from hvdlm.errors import STOPPED
from hvdlm.io.value_checks import fields, text
from hvdlm_trackers.tracker import Metrics, Tracker, numbers


@dataclass
class WandbOptions:
    """Where Weights & Biases stores the run.

    Args:
        project: the project that the run belongs to
        entity: the user or team that owns the project; null: your default
        name: the run's name in Weights & Biases; null: the name of the run's folder
        tags: tags of the run
        mode: online, offline (RUN/wandb, for wandb sync), or disabled; null: WANDB_MODE, else online
        wait: seconds to wait for a slow server at the end of the run
    """

    project: str = "hvdlm"
    entity: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline", "disabled"] | None = None
    wait: float = 60.0


class WeightsAndBiases(Tracker):
    """Logs the configuration, metrics by step and the summary; stopped runs end as preempted."""

    name, package = "wandb", "wandb"
    kept = staticmethod(fields({"run_id": text}))

    @hookimpl
    def hvdlm_options(self) -> Mapping[str, type]:
        """Return the options of the section wandb."""
        return {"wandb": WandbOptions}

    def begin(self) -> None:
        """Start or continue a run in Weights & Biases."""
        import wandb

        mode = self.options.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key is set: wandb login, or --wandb.mode offline")
        run_id = self.earlier().get("run_id") or uuid.uuid4().hex[:8]
        self.keep(run_id=run_id, project=self.options.project, entity=self.options.entity)
        self._run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            name=self.options.name or self.folder.name,
            tags=self.options.tags,
            mode=self.options.mode,
            dir=str(self.folder),
            id=run_id,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off"),  # the launcher collects the run's output
        )
        self._run.config.update({**self.config.to_dict(), "run": self.info}, allow_val_change=True)
        self._run.define_metric("*", step_metric="step")
        # W&B's own counter must increase, but a run that was rolled back logs the same steps again.
        self._step = -1
        self._counter = max(self.info["start_step"], self._run.step - 1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log the metrics of a step."""
        if step != self._step:
            self._counter = max(step, self._counter + 1)
        self._step = step
        self._run.log({**metrics, "step": step}, step=self._counter)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and end the run."""
        self._run.summary.update({**numbers(summary), "state": summary["stopped"] or "done"})
        if summary["stopped"]:
            self._run.mark_preempting()
        self._run.finish(exit_code=STOPPED if summary["stopped"] else 0)
