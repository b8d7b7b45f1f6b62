"""Template of an event plugin: records steps that took much longer than usual in RUN/slow_steps.jsonl.

Copy this folder, rename template_event everywhere, and keep the hooks that you need: a hook declares only those of its
arguments that it uses. Hooks run on every rank, and depend on no framework.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from hvdlm import hookimpl
from hvdlm.errors import HvdlmError


@dataclass
class SlowStepsOptions:
    """Options of the slow-step recorder.

    Args:
        factor: ratio of a slow step's time to the running mean
        most: maximum number of recorded steps
    """

    factor: float = 3.0
    most: int = 1000


class SlowSteps:
    """Records slow steps. The entry point names this class, which hvdlm instantiates once a run, without arguments."""

    def __init__(self):
        self.file = None  # open on rank 0 only
        self.mean = None
        self.count = 0

    @hookimpl
    def hvdlm_options(self):
        """Return the plugin's own options: --slow_steps.factor and --slow_steps.most."""
        return {"slow_steps": SlowStepsOptions}

    @hookimpl
    def hvdlm_check(self, config):
        """Raise an error of one sentence for invalid options, before the ranks connect."""
        if config.plugin_options["slow_steps"].factor <= 1:
            raise HvdlmError(
                "slow_steps.factor is 1 or less, so that every step would be slow: set --slow_steps.factor 3."
            )

    @hookimpl
    def hvdlm_run_started(self, config, world, info):
        """Open the file; a resumed run appends to it."""
        self.options = config.plugin_options["slow_steps"]
        if world.rank == 0:
            mode = "a" if info["start_step"] else "w"
            self.file = (Path(config.log.run) / "slow_steps.jsonl").open(mode, encoding="utf-8")

    @hookimpl
    def hvdlm_step_ended(self, step, seconds):
        """Compare with the mean of earlier steps, without the first one, which builds graphs."""
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
