"""Says at resumption where other settings than before change the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from hvdlm import hookimpl, plugins
from hvdlm.config import Config, TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.world import World
from hvdlm.training.lr_schedule import make_schedule
from hvdlm.training.run_control import RunControl

_SETTINGS = ["steps", "schedule", "learning_rate", "min_learning_rate", "warmup"]
_SETTINGS += ["cooldown", "cooldown_shape", "decay_every", "decay_start", "decay_factor"]
_TOLERANCE = 0.05  # relative change of the rate that is not worth a sentence


class ChangedRate:
    """Event plugin that compares the settings of a resumed run with those of its checkpoint, on rank 0."""

    observer = True

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, run: RunControl) -> None:
        """Print a sentence where the learning rate changes."""
        checkpoint = run.opened.checkpoint
        if checkpoint and world.rank == 0:
            before = checkpoint.manifest.get("config", {}).get("train", {})
            find_own = partial(plugins.find_schedule, run.opened.manager)
            sentence = changed_rate(before, config.train, checkpoint.step, find_own)
            if sentence:
                print(sentence, flush=True)


def changed_rate(
    before: Mapping[str, Any],
    config: TrainConfig,
    step: int,
    find_own: Callable[[TrainConfig], Callable[[int], float] | None] = lambda config: None,
) -> str | None:
    """Return a sentence if the update after ``step`` has another learning rate than with the settings ``before``.

    ``before``: the entries ``train`` of an earlier configuration, as a checkpoint's manifest has them; None is returned
    where they are damaged. ``find_own``: returns a plugin's schedule, and None for others.
    """
    try:
        known = {field.name: before[field.name] for field in fields(TrainConfig) if field.name in before}
        earlier = TrainConfig(**known)
        old, new = (make_schedule(c, find_own(c))(step) for c in (earlier, config))
        if not abs(new - old) > _TOLERANCE * abs(old):
            return None
        asked = [name for name in _SETTINGS if name in known and known[name] != getattr(config, name)]
        values = {name: (_value(earlier, name), _value(config, name)) for name in asked}
        changes = [f"train.{name} was {shown(was, 20)}, is {now}" for name, (was, now) in values.items() if was != now]
        return (
            f"hvdlm: the learning rate of step {step + 1} is {new:.2g}, not {old:.2g} as with the settings of the "
            f"checkpoint ({'; '.join(changes)}): --train.learning_rate and --train.schedule set another one"
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError, HvdlmError):
        return None


def _value(config: TrainConfig, name: str) -> Any:
    """Return an option, or what it stands for where it is null and that is known."""
    return getattr(config, f"{name}_value", getattr(config, name))
