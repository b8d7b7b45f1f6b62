"""Tasks: what a model learns of them on ranks, and what evaluation makes of it."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

from hvdlm_testing.checks.harness import Checked, Stage
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins
from hvdlm.inference.scorer import opener
from hvdlm.training.loop import over_ranks, sums_of

_STEPS, _BATCHES = 2, 2


def check_task(stage: Stage, subject: Subject, member: str, checked: Checked) -> None:
    """Train the model of the task's configuration for two steps, and evaluate it on a part of the validation split."""
    config = stage.config(subject)
    what = f"task {subject.name} in {stage.framework_name}"
    task = plugins.make(stage.manager, "task", subject.name, config=config, open_scorer=opener(config))
    maker = plugins.models(stage.manager)[config.model.name]
    trainable, _ = stage.build(maker(config.model, config.model.vocab or task.vocab, config.data.context), config)
    share, rank = config.train.batch_size // stage.world.size, stage.world.rank
    for step in range(_STEPS):
        batch = task.batch(step, rank * share, (rank + 1) * share)
        checked.figures.append(float(trainable.train_step([batch], 1e-4, step).loss))
    checked.require(all(map(math.isfinite, checked.figures)), f"{what}: a loss is not finite: {checked.figures}.")
    own: Counter[str] = Counter()
    for batch in islice(task.validation(rank, stage.world.size), _BATCHES):
        own.update(sums_of(task, trainable, batch))
    figures = task.metrics(over_ranks(stage.world, own))
    good = figures and all(isinstance(k, str) and isinstance(v, float | int) for k, v in figures.items())
    checked.require(good, f"{what}: metrics returns {figures!r}, expected figures by name.")
