"""Tests what the conformance suite can't know: that rows are sums, and the metric."""

import numpy as np
import pytest
from template_task import Addition, AdditionOptions, hvdlm_check

from hvdlm.config import Config
from hvdlm.errors import HvdlmError


@pytest.fixture
def config():
    return Config(task="template_task", plugin_options={"template_task": AdditionOptions(2, 10)})


def texts(task, batch):
    rows = np.concatenate([batch.inputs, batch.targets[:, -1:]], 1)
    return [task.tokenizer.decode(row.tolist()) for row in rows]


def test_rows_are_sums_whose_answers_are_targets(config):
    task = Addition(config)
    batch = task.rows(0, 20)
    for text, targets, weights in zip(texts(task, batch), batch.targets, batch.weights, strict=True):
        a, b, answer = int(text[:2]), int(text[3:5]), text[6:]
        assert answer == f"{a + b:03};"
        assert task.tokenizer.decode(targets[weights > 0].tolist()) == answer


def test_training_and_validation_have_no_sum_in_common(config):
    task = Addition(config)
    trained = set(texts(task, task.rows(0, 500)))
    held_out = {text for batch in task.validation(0, 1) for text in texts(task, batch)}
    assert len(held_out) > 5 and not trained & held_out


def test_the_accuracy_is_the_share_of_right_sums(config):
    task = Addition(config)
    (batch,) = task.validation(0, 1)
    scores = np.eye(task.vocab, dtype=np.float32)[batch.targets]
    scores[:3, -1] = -scores[:3, -1]  # the last target of three rows is wrong

    class Model:
        def predict(self, batch):
            return scores

    sums = {"loss": 0.0, "tokens": 1.0, **task.count(Model(), batch)}
    assert task.metrics(sums)["accuracy"] == pytest.approx(0.7)


def test_a_short_context_is_refused(config):
    config.data.context = 8
    with pytest.raises(HvdlmError, match=r"set --data\.context 9 or more"):
        hvdlm_check(config)
