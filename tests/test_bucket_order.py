"""Buckets of gradients are sent in one order on all ranks, in whatever order a backward pass finishes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_no_waiting import TwoRanks

from builders import configured_spec, small_config
from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.zero import ZeroExchange
from hvdlm_backends.local import LocalWorld


def build(zero: int) -> tuple[Any, list[int]]:
    """Return a model in training on the first of two ranks, and the list of the buckets that are started."""
    config, group = small_config("torch"), TwoRanks()
    config.communication.bucket_bytes = 8000
    exchange: Any = ZeroExchange(group, CommunicationConfig(), 0, zero) if zero else AllReduceExchange(group)
    framework = plugins.make(plugins.load(["torch"]), "framework", "torch")
    trainable = framework.build(configured_spec(config), Mesh(2, 1, 1), LocalWorld(), exchange, config)
    started: list[int] = []
    start = exchange.start

    def noted(bucket: torch.Tensor, index: int) -> Any:
        started.append(index)
        return start(bucket, index)

    exchange.start = noted
    return trainable, started


@pytest.mark.parametrize("zero", (0, 1, 2))
def test_buckets_are_started_in_their_order(zero: int) -> None:
    trainable, started = build(zero)
    gradients, leaves = trainable._gradients, list(trainable._adapters.leaves.values())
    buckets = list(range(len(trainable.layout.buckets)))
    assert len(buckets) > 2
    for order in (leaves, leaves[::-1], leaves[1::2] + leaves[::2], leaves[1:]):  # the last: one is not reached
        gradients.begin()
        for last in (False, True):
            gradients.before_backward(last)
            for leaf in order:
                leaf.sum().backward()
        gradients.reduce([torch.zeros((), dtype=torch.float64)], 0.0)
        assert started == buckets * (2 if zero == 2 else 1)  # ZeRO-2 scatters every micro-batch
        started.clear()
