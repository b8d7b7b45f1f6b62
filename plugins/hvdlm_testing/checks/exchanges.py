"""Checks of exchanges: their attributes, and training with them."""

from __future__ import annotations

from hvdlm import plugins
from hvdlm.protocols.exchange import ExchangeTraits
from hvdlm_testing.checks.harness import CONTEXT, VOCAB, Findings, Harness, Skip
from hvdlm_testing.checks.training import check_training
from hvdlm_testing.plugin_under_test import PluginUnderTest

_ATTRIBUTES = {"traits": ExchangeTraits, "agreed": bool, "stands_for": int, "traffic": dict}


def check_exchange(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check the exchange that has the plugin's name."""
    config = harness.config(plugin)
    config.model.name, config.communication.exchange = "rnn", plugin.name
    arguments = {"compressors": plugins.compressors(harness.manager), "index": harness.world.rank}
    make = harness.manager.hook.hvdlm_make_exchange
    exchange = make(name=plugin.name, group=harness.group, config=config, **arguments)
    if exchange is None:
        raise Skip(f"{plugin.name} makes no exchange of its own name, but of other names, which need options")
    for name, kind in _ATTRIBUTES.items():
        value = getattr(exchange, name, None)
        findings.require(
            isinstance(value, kind), f"exchange {plugin.name}: {name} is {value!r}, expected {kind.__name__}."
        )
    if findings.faults:
        return
    size, traits = harness.world.size, exchange.traits
    findings.require(
        traits.size == size, f"exchange {plugin.name}: its traits.size is {traits.size}, there are {size} ranks."
    )
    spec = plugins.models(plugins.load([]))["rnn"](config.model, VOCAB, CONTEXT)
    check_training(harness, spec, config, f"exchange {plugin.name} in {harness.framework_name}", findings)
