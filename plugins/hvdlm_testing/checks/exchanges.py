"""Checks of exchanges: their attributes, and training with them."""

from __future__ import annotations

import numpy as np

from hvdlm import plugins
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import make_layout
from hvdlm.protocols.exchange import Exchange, ExchangeTraits
from hvdlm_testing.checks.harness import VOCAB, Findings, Harness, Skip
from hvdlm_testing.checks.training import check_training
from hvdlm_testing.plugin_under_test import PluginUnderTest

_COSINE = 0.3  # that of a rank's own gradient (local SGD) and the sum of 2 ranks is 0.7
_ATTRIBUTES = {"traits": ExchangeTraits, "agreed": bool, "stands_for": int, "traffic": dict}


def check_exchange(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check the exchange that has the plugin's name."""
    config = harness.config(plugin)
    config.model.name, config.communication.exchange = "rnn", plugin.name
    arguments = {"compressors": plugins.provided(harness.manager, "compressors"), "index": harness.world.rank}
    arguments["subgroup"] = harness.world.group
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
    _check_order(harness, exchange, plugin.name, findings)
    spec = plugins.find_model(plugins.load(["rnn"]), "rnn")(config.model, VOCAB, config.data.context)
    check_training(harness, spec, config, f"exchange {plugin.name} in {harness.framework_name}", findings)


def _check_order(harness: Harness, exchange: Exchange, name: str, findings: Findings) -> None:
    """Check that the sum of every bucket has its elements in the order in which they were given."""
    params = [ParamSpec(f"p{n}", (96,), ("a",), Init("zeros")) for n in range(3)]
    layout = make_layout(params, 96 * 4, align=exchange.traits.zero_size)
    random = np.random.default_rng(7)
    gradients = random.normal(size=(harness.world.size, layout.size)).astype(np.float32)
    exchange.open(layout, np.zeros(layout.size, np.float32))
    exchange.begin(0)
    handles = []
    for index in range(len(layout.buckets)):
        start, stop = layout.bucket_range(index)
        bucket = harness.framework.tensor(gradients[harness.world.rank, start:stop].copy())
        handles.append(exchange.start(bucket, index))
    ranges = layout.zero_ranges(exchange.traits.zero_rank, exchange.traits.zero_size)
    for (start, stop), handle in zip(ranges, handles, strict=True):
        expected, result = gradients[:, start:stop].sum(0), np.asarray(handle.wait(), np.float64)
        cosine = float(result @ expected / (np.linalg.norm(result) * np.linalg.norm(expected) + 1e-30))
        if not findings.require(
            cosine > _COSINE,
            f"exchange {name}: the sum of a bucket has another direction than its gradients (cosine {cosine:.2f}): "
            "does start() keep the order of elements and of buckets?",
        ):
            return
