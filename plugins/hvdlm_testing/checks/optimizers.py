"""Checks of optimizers: their state, updates of single elements, and training with them."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.protocols.optimizer import Optimizer
from hvdlm_testing.checks.harness import VOCAB, Findings, Harness, Skip
from hvdlm_testing.checks.training import check_training
from hvdlm_testing.plugin_under_test import PluginUnderTest

_SIZE = 64


def check_optimizer(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check a plugin's optimizer in this framework."""
    if "optimizer" not in signature(harness.framework.build).parameters:
        raise Skip(f"framework {harness.framework_name} has no optimizers of plugins")
    config = harness.config()
    config.train.optimizer, label = member, f"optimizer {member} in {harness.framework_name}"
    optimizer = plugin.members("optimizers")[member](config.train)
    state = getattr(optimizer, "state", None)
    if not isinstance(state, tuple) or not all(isinstance(name, str) and "/" not in name for name in state):
        findings.fault(f"{label}: state is {state!r}, expected a tuple of names without slashes.")
        return
    findings.require(isinstance(getattr(optimizer, "decoupled", None), bool), f"{label}: decoupled is not a bool.")
    _check_elements(harness, optimizer, label, findings)
    config.model.name = "rnn"
    spec = plugins.find_model(plugins.load(["rnn"]), "rnn")(config.model, VOCAB, config.data.context)
    check_training(harness, spec, config, label, findings, fall=0.0)


def _check_elements(harness: Harness, optimizer: Optimizer, label: str, findings: Findings) -> None:
    """Check that the update of half of a vector is half of the vector's: a rank may hold a shard."""
    whole, half = (_updated(harness, optimizer, size) for size in (_SIZE, _SIZE // 2))
    names = {"parameters", *optimizer.state}
    if not findings.require(set(whole) == names, f"{label}: update returns {sorted(whole)}, expected {sorted(names)}."):
        return
    for name in sorted(names):
        array = whole[name]
        findings.require(
            array.dtype == np.float32 and array.shape == (_SIZE,),
            f"{label}: update returns {name} as {array.dtype} {list(array.shape)}, expected float32 [size].",
        )
        findings.require(
            np.allclose(array[: _SIZE // 2], half[name], atol=1e-6),
            f"{label}: {name} of an element depends on other elements, of which a rank may hold a part only.",
        )


def _updated(harness: Harness, optimizer: Optimizer, size: int) -> dict[str, np.ndarray]:
    """Return what two updates make of the first ``size`` elements of a vector, by name."""
    random = np.random.default_rng(7)
    vectors = random.standard_normal((2, _SIZE)).astype(np.float32)[:, :size]
    parameters, gradient = (harness.framework.tensor(vector.copy()) for vector in vectors)
    state: Any = {name: harness.framework.tensor(np.zeros(size, np.float32)) for name in optimizer.state}
    for step in range(2):
        rate, number = (harness.framework.tensor(np.array(value, np.float32)) for value in (0.01, step))
        parameters, state = optimizer.update(parameters, gradient, state, rate, number)
    return {name: np.asarray(array) for name, array in {"parameters": parameters, **state}.items()}
