"""A template of a plugin on events: writes down the steps that took much longer than usual, in RUN/slow_steps.jsonl.

Copy this folder, rename what is called template_event, and keep the hooks you need: a hook takes those of its
arguments that it names. It runs on every rank, and in no framework.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from hvdlm import hookimpl
from hvdlm.errors import HvdlmError


@dataclass
class SlowStepsOptions:
    """Which steps are slow.

    Args:
        factor: how much longer than the running mean a slow step takes
        most: slow steps that are written down at most
    """

    factor: float = 3.0
    most: int = 1000


class SlowSteps:
    """The entry point names this class; it is made without arguments, once a run."""

    def __init__(self):
        self.file = None  # only rank 0 has one
        self.mean, self.count = None, 0

    @hookimpl
    def hvdlm_options(self):
        """Options of one's own: --slow_steps.factor."""
        return {"slow_steps": SlowStepsOptions}

    @hookimpl
    def hvdlm_check(self, config):
        """Refuse in one sentence what can't be, before ranks meet."""
        if config.plugin_options["slow_steps"].factor <= 1:
            raise HvdlmError("slow_steps.factor is 1 or less, every step would be slow: set --slow_steps.factor 3.")

    @hookimpl
    def hvdlm_run_started(self, config, world, info):
        """Open the file; a run that is resumed goes on in it."""
        self.options = config.plugin_options["slow_steps"]
        if world.rank == 0:
            mode = "a" if info["start_step"] else "w"
            self.file = (Path(config.log.run) / "slow_steps.jsonl").open(mode, encoding="utf-8")

    @hookimpl
    def hvdlm_step_ended(self, step, seconds):
        """Compare with the mean of the steps before; the first builds graphs, and tells nothing of the others."""
        if self.file is None or step == 1:
            return
        if self.mean is not None and seconds > self.options.factor * self.mean and self.count < self.options.most:
            self.count += 1
            self.file.write(json.dumps({"step": step, "seconds": seconds, "mean": self.mean}) + "\n")
            self.file.flush()
        self.mean = seconds if self.mean is None else 0.9 * self.mean + 0.1 * seconds

    @hookimpl
    def hvdlm_run_ended(self):
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None
