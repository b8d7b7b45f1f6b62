"""Weights & Biases: ``--plugins [wandb]``. Needs wandb, and ``wandb login`` unless the mode is offline."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hvdlm import hookimpl
from hvdlm.errors import STOPPED
from hvdlm_trackers.tracker import Figures, Tracker, numbers


@dataclass
class WandbOptions:
    """Where Weights & Biases keeps the run.

    Args:
        project: the project that the run belongs to
        entity: the user or team whose project it is; None: your default one
        name: the run's name there; None: that of the run's folder
        tags: words to find the run by
        mode: online, offline (RUN/wandb, for wandb sync), or disabled; None: WANDB_MODE, else online
        wait: seconds that the end of the run waits at most for a slow server
    """

    project: str = "hvdlm"
    entity: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline", "disabled"] | None = None
    wait: float = 60.0


class WeightsAndBiases(Tracker):
    """The configuration, metrics by step and the summary; stopped runs end as preempted."""

    name, package = "wandb", "wandb"

    @hookimpl
    def hvdlm_options(self) -> Mapping[str, type]:
        """Bring the section wandb."""
        return {"wandb": WandbOptions}

    def begin(self) -> None:
        """See ``Tracker``."""
        import wandb

        mode = self.options.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key is set: wandb login, or --wandb.mode offline")
        found = self.earlier().get("run_id")
        name = found or uuid.uuid4().hex[:8]
        self.keep(run_id=name, project=self.options.project, entity=self.options.entity)
        self._run = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            name=self.options.name or self.folder.name,
            tags=self.options.tags,
            mode=self.options.mode,
            dir=str(self.folder),
            id=name,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off"),  # what a run prints is the launcher's
        )
        self._run.config.update({**self.config.to_dict(), "run": self.info}, allow_val_change=True)
        self._run.define_metric("*", step_metric="step")
        # W&B's own counter only rises, while a run that went back tells of the same steps again.
        self._step, self._counter = -1, max(self.info["start_step"], self._run.step - 1)

    def log(self, step: int, figures: Figures) -> None:
        """See ``Tracker``."""
        if step != self._step:
            self._counter = max(step, self._counter + 1)
        self._step = step
        self._run.log({**figures, "step": step}, step=self._counter)

    def end(self, summary: Mapping[str, Any]) -> None:
        """See ``Tracker``."""
        self._run.summary.update({**numbers(summary), "state": summary["stopped"] or "done"})
        if summary["stopped"]:
            self._run.mark_preempting()
        self._run.finish(exit_code=STOPPED if summary["stopped"] else 0)
