"""The length of a run in steps, tokens or epochs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import hvdlm
from hvdlm.config import Config
from hvdlm.configuration.parsing import parse_config
from hvdlm.errors import HvdlmError
from hvdlm.training import loop
from hvdlm.training import run as run_module
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run_length import with_steps
from hvdlm_language.sampler import SequentialSampler, ShuffledSampler
from launching import SMALL, losses, metrics, run_python


def steps(task: dict[str, Any], **train: Any) -> int:
    config = Config()
    config.train.batch_size = 8
    for name, value in train.items():
        setattr(config.train, name, value)
    return with_steps(config, SimpleNamespace(**task)).train.steps  # type: ignore[arg-type]


def test_tokens_and_epochs_become_whole_steps() -> None:
    rows = {"row_tokens": 32, "epoch_rows": 100}
    assert steps(rows, steps=7) == 7
    assert [steps(rows, tokens=n) for n in (1, 256, 257, 10_000)] == [1, 1, 2, 40]
    assert [steps(rows, epochs=n) for n in (0.001, 0.08, 1.0, 2.5)] == [1, 1, 13, 32]


def test_a_resumed_run_has_the_steps_that_the_rest_needs() -> None:
    config = Config()
    config.train.tokens, config.train.batch_size = 32 * 100, 8
    task: Any = SimpleNamespace(row_tokens=32)
    # 10 steps of 4 rows: 60 rows are left, in 8 steps of 8.
    assert with_steps(config, task, 10, 40).train.steps == 18
    assert [with_steps(config, task, n, 8 * n).train.steps for n in (0, 5, 12, 13)] == [13] * 4
    assert with_steps(config, task, 50, 200).train.steps == 50
    cursor = DataCursor(8, 80, [(8, 24), (16, 32), (76, 90), (200, 300)])
    assert cursor.trained == 80 - 24 - 4
    assert DataCursor(8, 16).trained == 16


def test_tokens_are_those_of_all_batch_sizes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["-m", "hvdlm", *SMALL, "--train.batch_size", "8", "--train.tokens", str(12 * 8 * 32)]
    done = run_python([*command, "--checkpoint.every", "6", "--log.run", str(run)])
    assert done.returncode == 0 and "steps 0 to 12" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    half = str(min((run / "checkpoints").glob("step-*")))
    more = ["--config", str(run / "config.yaml"), "--train.batch_size", "16", "--log.run", str(tmp_path / "more")]
    done = run_python(["-m", "hvdlm", *more, "--checkpoint.resume", half])
    assert done.returncode == 0 and "steps 6 to 9" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("task", "mixture", "train", "sentence"),
    [
        ("translation", None, {"tokens": 10}, "train.tokens: rows of the task translation differ in their tokens"),
        ("own", None, {"epochs": 1.0}, "train.epochs: the task own has no epochs"),
        ("language_model", {"a.txt": 1}, {"epochs": 1.0}, "train.epochs: a data.mixture has no epochs"),
    ],
)
def test_a_length_that_a_task_lacks_is_refused(task: str, mixture: Any, train: dict[str, Any], sentence: str) -> None:
    config = Config(task=task)
    config.data.mixture = mixture
    vars(config.train).update(train)
    with pytest.raises(HvdlmError, match=sentence):
        with_steps(config, SimpleNamespace(epoch_rows=None))  # type: ignore[arg-type]


def test_an_epoch_of_either_sampling_has_every_window_once() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    for sampler in (ShuffledSampler(tokens, 16, 4, 1), SequentialSampler(tokens, 16, 4)):
        count = sampler.epoch_rows
        batches = [sampler.rows(first, min(first + 4, count))[0] for first in range(0, count, 4)]
        seen = np.concatenate(batches).ravel()
        assert len(np.unique(seen)) == len(seen) >= 1000 - 4 * 16 - 16


def test_the_length_that_is_given_last_counts(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 2000, batch_size: 8}")
    file = ["--config", str(tmp_path / "run.yaml")]

    def length(*arguments: str) -> tuple[int, int | None, float | None]:
        train = parse_config([*file, *arguments]).train
        return train.steps, train.tokens, train.epochs

    assert length() == (2000, None, None)
    assert length("--train.epochs", "3") == (2000, None, 3.0)
    assert length("--train.epochs=3", "--train.tokens=1e6") == (2000, 1_000_000, None)
    assert length("--train.tokens", "1e6", "--train.epochs", "0.5") == (2000, None, 0.5)
    assert length("--train.epochs", "3", "--train.steps", "50") == (50, None, None)
    assert length("--train.tokens", "1000", "--train.epochs", "null") == (2000, 1000, None)
    config = parse_config([*file, "--train.epochs", "3"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert parse_config(["--config", str(tmp_path / "again.yaml")]).train.epochs == 3.0


def test_two_lengths_of_a_configuration_are_refused(tmp_path: Path) -> None:
    config = hvdlm.Config.load({"log.run": str(tmp_path / "run"), "train.epochs": 1})
    config.train.tokens = 1000
    with pytest.raises(HvdlmError, match=r"train\.tokens and train\.epochs both set the length"):
        hvdlm.train(config)


def test_a_run_of_tokens_or_epochs_is_one_of_steps(tmp_path: Path) -> None:
    # In processes of their own, as a user starts them: the schedule and the resumed run know the number of steps.
    run, other = tmp_path / "run", tmp_path / "other"
    command = ["-m", "hvdlm", *SMALL, "--train.warmup", "2", "--train.schedule", "wsd", "--train.cooldown", "4"]
    command += ["--checkpoint.every", "6"]
    done = run_python([*command, "--train.steps", "12", "--log.run", str(other)])
    assert done.returncode == 0, done.stderr[-2000:]
    done = run_python([*command, "--train.tokens", str(12 * 8 * 32), "--log.run", str(run)])
    assert done.returncode == 0 and "steps 0 to 12" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(run) == losses(other) and len(losses(run)) == 12
    rates = [line["learning_rate"] for line in metrics(run) if "learning_rate" in line]
    assert rates[2:9] == [1e-3] * 7 and rates[9] > rates[10] > rates[11] > 1e-4
    more = ["--config", str(run / "config.yaml"), "--train.tokens", str(16 * 8 * 32), "--checkpoint.resume"]
    done = run_python(["-m", "hvdlm", *more, str(min((run / "checkpoints").glob("step-*")))])
    assert done.returncode == 0 and "steps 6 to 16" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    # Before the cooldown, the rate doesn't depend on the length: no sentence about a changed rate.
    assert "the learning rate of step 7" not in done.stdout and losses(run)[6:8] == losses(other)[6:8]


def test_a_profile_beyond_the_epochs_is_refused(tmp_path: Path) -> None:
    options = [*SMALL, "--train.epochs", "0.01", "--log.profile", "5000:5001", "--log.run", str(tmp_path / "run")]
    done = run_python(["-m", "hvdlm", *options])
    assert done.returncode == 2 and "log.profile" in done.stderr, done.stderr[-2000:]


def test_only_the_last_evaluation_has_the_whole_split(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--train.steps", "9", "--train.eval_every", "3", "--train.eval_tokens", "64"]
    done = run_python(["-m", "hvdlm", *options, "--log.run", str(run)])
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {line["step"]: line["val_loss"] for line in metrics(run) if "val_loss" in line}
    assert list(figures) == [3, 6, 9]
    assert figures[9] == pytest.approx(hvdlm.load(run).evaluate()["val_loss"], abs=1e-12)
    trained = hvdlm.load(run)._run
    assert trained
    # Two windows of context 32, the first of the split and that in its middle.
    batches = list(trained.task.validation(0, 1, 64))
    assert sum(batch.tokens for batch in batches) == 64
    assert loop.evaluate(trained, limit=64)["val_loss"] not in (figures[9], figures[6])


def test_a_task_that_evaluates_only_all_refuses_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(vocab=5, validation=lambda rank, size: ())
    monkeypatch.setattr(run_module.plugins, "make", lambda *names, **options: task)
    config = Config(task="own")
    config.train.eval_tokens = 64
    with pytest.raises(HvdlmError, match=r"train\.eval_tokens: the task own evaluates its whole split only"):
        run_module.open_task(SimpleNamespace(config=config, manager=None))  # type: ignore[arg-type]
