"""Checks of tasks: training steps and an evaluation on all ranks."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

from hvdlm import plugins
from hvdlm.training.loop import over_ranks, sums_of
from hvdlm_testing.checks.harness import Findings, Harness
from hvdlm_testing.plugin_under_test import PluginUnderTest

_STEPS, _BATCHES = 2, 2


def check_task(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Train the model of the task's configuration for two steps, and evaluate it on two batches."""
    config = harness.config(plugin)
    label = f"task {plugin.name} in {harness.framework_name}"
    task = plugins.make(harness.manager, "task", plugin.name, config=config)
    models = {
        **plugins.provided(plugins.load([config.model.name]), "models"),
        **plugins.provided(harness.manager, "models"),
    }
    maker = models[config.model.name]
    trainable, _ = harness.build(maker(config.model, config.model.vocab or task.vocab, config.data.context), config)
    batch_size, rank = config.train.batch_size, harness.world.rank
    rows = batch_size // harness.world.size
    for step in range(_STEPS):
        batch = task.rows(step * batch_size + rank * rows, step * batch_size + (rank + 1) * rows)
        findings.figures.append(float(trainable.train_step([batch], 1e-4, step).loss))
    findings.require(all(map(math.isfinite, findings.figures)), f"{label}: a loss is not finite: {findings.figures}.")
    sums: Counter[str] = Counter()
    for batch in islice(task.validation(rank, harness.world.size), _BATCHES):
        sums.update(sums_of(task, trainable, batch))
    figures = task.metrics(over_ranks(harness.world, [sums]))
    valid = figures and all(isinstance(k, str) and isinstance(v, float | int) for k, v in figures.items())
    findings.require(valid, f"{label}: metrics returns {figures!r}, expected figures by name.")
