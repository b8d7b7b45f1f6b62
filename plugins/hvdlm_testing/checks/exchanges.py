"""Exchanges: their attributes, and training with them."""

from __future__ import annotations

from hvdlm_testing.checks.harness import CONTEXT, VOCAB, Checked, Skip, Stage
from hvdlm_testing.checks.training import check_training
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins

_ATTRIBUTES = {"size": int, "replicas_diverge": bool, "agreed": bool, "stands_for": int, "part": int, "parts": int}
_ATTRIBUTES |= {"scatters_every": bool, "traffic": dict}


def check_exchange(stage: Stage, subject: Subject, member: str, checked: Checked) -> None:
    """Check the exchange that has the plugin's name."""
    config = stage.config(subject)
    config.model.name, config.communication.exchange = "rnn", subject.name
    more = {"compressors": plugins.compressors(stage.manager), "index": stage.world.rank}
    made = stage.manager.hook.hvdlm_make_exchange(name=subject.name, group=stage.group, config=config, **more)
    if made is None:
        raise Skip(f"{subject.name} makes no exchange of its own name: it answers to others, with their options")
    for name, kind in _ATTRIBUTES.items():
        value = getattr(made, name, None)
        checked.require(
            isinstance(value, kind), f"exchange {subject.name}: {name} is {value!r}, expected {kind.__name__}."
        )
    size = stage.world.size
    checked.require(made.size == size, f"exchange {subject.name}: its size is {made.size}, there are {size} ranks.")
    spec = plugins.models(plugins.load([]))["rnn"](config.model, VOCAB, CONTEXT)
    check_training(stage, spec, config, f"exchange {subject.name} in {stage.framework_name}", checked)
