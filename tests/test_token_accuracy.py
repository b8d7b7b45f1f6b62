"""Token accuracy in evaluations: the share of targets of which no other token has a higher score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import VOCAB, both_frameworks, encoder_batch, read_json, small_trainable, token_batch, train_steps
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.protocols.types import Batch
from hvdlm.training.loop import sums_of
from hvdlm_language.language_model import LanguageModel
from launching import SMALL


def predicted(scores: np.ndarray, batch: Batch) -> float:
    """Return how many targets that count have the highest of the ``scores`` ``[rows, time, vocab]``."""
    weights = np.ones(batch.targets.shape) if batch.weights is None else batch.weights
    return float(((scores.argmax(-1) == batch.targets) * weights).sum())


def trained(framework: str, model: str = "gpt", **options: Any) -> Any:
    """Return a model that knows some of the rows it is evaluated on."""
    trainable = small_trainable(framework, model, **options)
    for step in range(8):
        trainable.train_step([token_batch(0)], 0.01, step)
    return trainable


@both_frameworks
@pytest.mark.parametrize("precision, chunk", [("fp32", None), ("bf16", None), ("fp32", 5 * VOCAB)])
def test_targets_with_the_highest_score_are_counted(
    framework: str, precision: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework == "torch" and chunk:
        from hvdlm_torch import losses

        monkeypatch.setitem(losses._CHUNK, "cpu", chunk)
    elif chunk:
        from hvdlm_tensorflow import losses as of_tensorflow

        monkeypatch.setattr(of_tensorflow, "_CHUNK", chunk)
        monkeypatch.setattr(of_tensorflow, "_MOST_CHUNKS", 100)
    trainable = trained(framework, precision=precision)
    for batch in (token_batch(0), token_batch(0, weights=True)):
        loss, _, count = trainable.eval_figures(batch)
        expected = predicted(trainable.predict(batch), batch)
        assert 20 < expected < batch.tokens
        assert count == (expected if precision == "fp32" else pytest.approx(expected, abs=3))
        assert (loss, batch.tokens) == trainable.eval_step(batch)


@both_frameworks
@pytest.mark.parametrize("model", ["lstm", "seq2seq", "ctc"])
def test_other_models(framework: str, model: str) -> None:
    """Of recurrent models and encoders, too; CTC has no target of a position."""
    if model == "lstm":
        trainable, batch = trained(framework, model), token_batch(0)
    else:
        trainable, batch = small_trainable(framework, model), encoder_batch(model)
    *_, count = trainable.eval_figures(batch)
    assert count == (0.0 if model == "ctc" else predicted(trainable.predict(batch), batch))


@both_frameworks
def test_equal_scores_all_count(framework: str) -> None:
    trainable = small_trainable(framework)
    zeros = {name: np.zeros_like(a) for name, a in trainable.state().items() if name.startswith("parameters/")}
    trainable.load_state(zeros)
    batch = token_batch(1, weights=True)
    assert trainable.eval_figures(batch)[1:] == (batch.tokens, batch.tokens)


class LossAlone:
    """A framework's model that doesn't count."""

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        return 3.0, batch.tokens


def test_frameworks_need_not_count() -> None:
    class Task:
        def count(self, trainable: Any, batch: Batch) -> dict[str, float]:
            return {}

    batch = token_batch(0)
    batch.corpus = "wiki"
    task: Any = Task()
    alone: Any = LossAlone()
    assert sums_of(task, alone, batch) == {"wiki/loss": 3.0, "wiki/tokens": 96.0}
    trainable = small_trainable("torch")
    train_steps(trainable, 1)
    assert sums_of(task, trainable, batch).keys() == {"wiki/loss", "wiki/tokens", "wiki/predicted"}


def test_without_targets_it_is_not_a_number(tmp_path: Path) -> None:
    """As the loss: ``train.eval_tokens`` may choose prompts alone."""
    task = LanguageModel(Config(data=DataConfig(tokenizer="byte", cache=str(tmp_path))))
    figures = task.metrics({"loss": 0.0, "tokens": 0.0, "predicted": 0.0})
    assert math.isnan(figures["token_accuracy"]) and math.isnan(figures["val_loss"])


def test_every_report_of_a_run_has_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.run([*SMALL, "--train.steps", "20", "--train.warmup", "0", "--log.run", str(run)]) == 0
    assert "token_accuracy 0." in capfd.readouterr().out
    accuracy = read_json(run / "summary.json")["token_accuracy"]
    assert 0.1 < accuracy < 0.5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["token_accuracy"] for line in lines if "token_accuracy" in line] == [accuracy]
    assert not any("token_accuracy" in line for line in lines if "val_loss" not in line)  # not of training steps
    assert cli.run(["evaluate", "--run", str(run)]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["token_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert cli.run(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert f"{100 * accuracy:.3g}%" in (tmp_path / "report.html").read_text()
