"""The moving average of the weights (``train.ema``) against its equation in numpy, in checkpoints, runs and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hvdlm
from builders import (
    FRAMEWORKS,
    both_frameworks,
    configured_spec,
    parameters,
    read_json,
    save_checkpoint,
    small_config,
    small_trainable,
    token_batch,
    train_steps,
)
from hvdlm import cli
from hvdlm.checkpoints.load import averaged, open_checkpoint, read_state
from hvdlm.config import TrainConfig
from hvdlm.configuration import ranges
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import closed_form
from hvdlm.planning.gradient_work import work_of
from hvdlm_backends.local import LocalWorld
from launching import SMALL, launch

DECAY, RATE = 0.6, 0.02
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "groups": {"embed.*": {"learning_rate_scale": 0.5}}},
    "muon": {"optimizer": "muon", "mlp_width": 24},
}


def averages(trainable: Any) -> dict[str, np.ndarray]:
    """Return the moving averages of a trainable by the names of the parameters."""
    prefix = "optimizer/ema/"
    return {name.removeprefix(prefix): a for name, a in trainable.state().items() if name.startswith(prefix)}


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=0, atol=tolerance, err_msg=name)


@both_frameworks
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_twenty_steps_follow_the_equation(framework: str, options: dict[str, Any]) -> None:
    """Of steps that are applied; the decay grows from 0.1 to ``train.ema`` at update 13."""
    trainable = small_trainable(framework, ema=DECAY, **options)
    expected = {name: array.astype(np.float64) for name, array in parameters(trainable).items()}
    for step in range(20):
        limit = 1e-9 if step in (3, 11) else 1e9
        result = trainable.train_step([token_batch(step)], RATE, step, limit)
        assert result.skipped == (step in (3, 11))
        if not result.skipped:
            decay, now = min(DECAY, (1 + step) / (10 + step)), parameters(trainable)
            expected = {name: decay * mean + (1 - decay) * now[name] for name, mean in expected.items()}
    assert_close(averages(trainable), expected, 1e-6)
    distance = max(np.abs(array - expected[name]).max() for name, array in parameters(trainable).items())
    assert distance > 1e-3  # from what is averaged


@both_frameworks
def test_a_constant_decay_is_reached(framework: str) -> None:
    trainable = small_trainable(framework, ema=DECAY)
    trainable.train_step([token_batch(0)], RATE, 50)  # (1 + 50) / (10 + 50) is above 0.6
    initial, now = parameters(small_trainable(framework)), parameters(trainable)
    assert_close(averages(trainable), {name: 0.6 * initial[name] + 0.4 * now[name] for name in now}, 1e-6)


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="two frameworks")
def test_both_frameworks_average_alike_and_load_each_other() -> None:
    one, other = (small_trainable(framework, bias=False, ema=0.9) for framework in FRAMEWORKS)
    for trainable in (one, other):
        train_steps(trainable, 20)
    assert_close(averages(one), averages(other), 1e-4)
    other.load_state(one.state())
    assert_close(averages(other), averages(one), 0.0)


@both_frameworks
def test_training_resumes_bit_for_bit(framework: str) -> None:
    first, second = (small_trainable(framework, ema=DECAY) for _ in range(2))
    train_steps(first, 3)
    second.load_state(first.state())
    for trainable in (first, second):
        trainable.train_step([token_batch(3)], RATE, 3)
    assert_close(averages(first), averages(second), 0.0)


@both_frameworks
def test_a_resumed_run_may_start_or_drop_the_average(framework: str) -> None:
    without, with_it = small_trainable(framework), small_trainable(framework, ema=DECAY)
    train_steps(without, 2)
    with_it.load_state(without.state())
    assert_close(averages(with_it), parameters(without), 0.0)
    without.load_state(with_it.state())
    assert not averages(without)


@both_frameworks
def test_evaluation_shows_the_average_until_training_continues(framework: str) -> None:
    trainable = small_trainable(framework, ema=DECAY)
    train_steps(trainable, 5)
    mean, batch = small_trainable(framework), token_batch(9)
    mean.load_state({f"parameters/{name}": array for name, array in averages(trainable).items()})
    own, before = trainable.eval_step(batch), trainable.state()
    trainable.show_average(True)
    assert trainable.eval_step(batch)[0] == pytest.approx(mean.eval_step(batch)[0], rel=1e-6)
    assert trainable.eval_step(batch)[0] != own[0]
    assert_close(trainable.state(), before, 0.0)  # shows the parameters again
    trainable.show_average(True)
    trainable.show_average(False)
    assert trainable.eval_step(batch) == own
    other = small_trainable(framework, ema=DECAY)
    other.load_state(before)
    trainable.show_average(True)
    losses = [t.train_step([token_batch(5)], RATE, 5).loss for t in (trainable, other)]
    assert losses[0] == losses[1]


@both_frameworks
def test_adapters_are_averaged_and_merged(framework: str) -> None:
    trainable = small_trainable(framework, lora={"rank": 2}, ema=DECAY)
    train_steps(trainable, 4, rate=0.1)
    assert averages(trainable).keys() == parameters(trainable).keys() and len(averages(trainable)) == 16
    mean = small_trainable(framework, lora={"rank": 2})
    mean.load_state({f"parameters/{name}": array for name, array in averages(trainable).items()})
    trainable.show_average(True)
    assert trainable.eval_step(token_batch(9)) == pytest.approx(mean.eval_step(token_batch(9)), rel=1e-6)


def test_a_checkpoint_is_read_with_its_average(tmp_path: Path) -> None:
    trainable = small_trainable("torch", ema=DECAY)
    train_steps(trainable, 2)
    paths = []
    for decay in (DECAY, None):
        saved = small_trainable("torch", ema=decay)
        saved.load_state(trainable.state())
        folder = tmp_path / str(decay)
        paths.append(save_checkpoint(folder, 2, saved.state(), {}, LocalWorld(), saved.shards()))
    checkpoint = averaged(open_checkpoint(paths[0]))
    wanted = {name: shard for name, shard in trainable.shards().items() if name.startswith("parameters/")}
    state = read_state(checkpoint, wanted, 0, 1)
    assert_close({name.removeprefix("parameters/"): array for name, array in state.items()}, averages(trainable), 0.0)
    with pytest.raises(HvdlmError, match="holds no moving average of the weights: leave --weights ema out"):
        averaged(open_checkpoint(paths[1]))


def test_the_plan_has_four_bytes_a_parameter_more() -> None:
    config, mesh = small_config("torch"), Mesh(2, 1, 1)
    spec, costs, works = configured_spec(config), {}, {}
    for zero in (0, 1):
        for ema in (None, 0.999):
            config.parallel.zero, config.train = zero, replace(config.train, ema=ema)
            predicted, works[zero, ema] = closed_form(config, spec, mesh, 0), work_of(config, spec, mesh, 0)
            assert predicted
            costs[zero, ema] = predicted.memory["optimizer"]
    size = works[0, None].update_elements
    assert [costs[zero, 0.999] - costs[zero, None] for zero in (0, 1)] == [4 * size, 2 * size]
    assert works[0, 0.999].update_bytes - works[0, None].update_bytes == 12 * size


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_is_between_zero_and_one(value: float) -> None:
    with pytest.raises(HvdlmError, match=r"train\.ema is .*, expected above 0 and below 1"):
        ranges.check({"train": TrainConfig(ema=value)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of torch that has averaged its weights."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    options = ["--train.steps", "12", "--train.warmup", "0", "--train.eval_every", "6", "--train.ema", "0.9"]
    assert cli.run([*SMALL, *options, "--log.run", str(folder)]) == 0
    return folder


def evaluated(run: Path, capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, float]:
    assert cli.run(["evaluate", "--run", str(run), *options]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_validation_reports_both_weights(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = read_json(run / "summary.json")
    losses = {line["step"]: line["ema_val_loss"] for line in lines if "ema_val_loss" in line}
    assert list(losses) == [6, 12] and losses[12] == summary["ema_val_loss"] != summary["val_loss"]
    assert {f"ema_{name}" for name in ("val_loss", "perplexity", "bits_per_byte")} <= summary.keys()
    trained, mean = evaluated(run, capfd), evaluated(run, capfd, "--weights", "ema")
    assert trained["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert mean["val_loss"] == pytest.approx(summary["ema_val_loss"], abs=1e-6)
    assert not any(name.startswith("ema_") for name in {**trained, **mean})
    with hvdlm.load(run, weights="ema") as loaded:
        assert loaded.evaluate()["val_loss"] == pytest.approx(mean["val_loss"], abs=1e-6)


@pytest.mark.skipif("tensorflow" not in FRAMEWORKS, reason="two frameworks")
def test_the_other_framework_evaluates_the_average(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = evaluated(run, capfd, "--weights", "ema", "--framework", "tensorflow")
    assert result["val_loss"] == pytest.approx(read_json(run / "summary.json")["ema_val_loss"], abs=1e-4)


def test_exports_and_texts_are_those_of_the_average(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from safetensors.numpy import load_file

    common = ["--run", str(run), "--weights", "ema"]
    assert cli.run(["convert", *common, "--output", str(tmp_path / "mean.safetensors")]) == 0
    stored = load_file(next(run.glob("checkpoints/step-00000012/optimizer*.safetensors")))
    prefix = "optimizer/ema/"
    expected = {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}
    assert_close(load_file(tmp_path / "mean.safetensors"), expected, 0.0)
    capfd.readouterr()
    with pytest.raises(HvdlmError, match="weights: expected trained or ema, got 'mean'"):
        hvdlm.load(run, weights="mean")  # type: ignore[arg-type]
    texts = []
    for weights in ("trained", "ema"):
        assert cli.run(["generate", *common[:3], weights, "--tokens", "60", "--prompt", "The"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] != texts[1]


def test_exchanges_whose_ranks_differ_are_refused(tmp_path: Path) -> None:
    options = [*SMALL, "--log.run", str(tmp_path / "run"), "--train.ema", "0.9", "--train.steps", "50"]
    done = launch("threads", 2, ["-m", "hvdlm", *options, "--communication.exchange", "diloco"])
    assert done.returncode == 2, done.stderr
    assert "ranks of diloco have different ones between synchronisations: leave it out" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("exchange", ["local_sgd", "diloco", "streaming_diloco", "zero_one_adam"])
@pytest.mark.parametrize(
    "command", [["--parallel.data", "2"], ["--search", "--ranks", "2", "--hardware", "h100"]], ids=str
)
def test_plans_refuse_it_where_ranks_differ(
    exchange: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train.ema", "0.99", "--communication.exchange", exchange]
    options += ["--train.optimizer", "sgd", "--train.clip", "0"] if exchange == "zero_one_adam" else []
    assert cli.main(["plan", *options, *command]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"ranks of {exchange} have different ones between synchronisations: leave it out" in sentence
