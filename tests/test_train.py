"""The main job, end to end: real launchers, both frameworks, one curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launching import launch

SMALL = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2"]
SMALL += ["--train.batch_size", "8", "--data.context", "32", "--log.every", "1"]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def curve(tmp_path_factory):
    """Return a function that trains once per set of options and returns the run's folder."""
    done: dict[tuple, Path] = {}

    def train(framework: str, ranks: int, *options: str, launcher: str = "mpirun") -> Path:
        key = (framework, ranks, options, launcher)
        if key not in done:
            run = tmp_path_factory.mktemp("run")
            arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(run), *SMALL, *options]
            finished = launch(launcher, ranks, arguments)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
            done[key] = run
        return done[key]

    return train


KILLED_AFTER_STEP_25 = """
import os, signal, sys
from hvdlm import cli, hookimpl, telemetry

class Killer:
    @hookimpl
    def hvdlm_step_ended(self, step):
        if step == 25:
            os.kill(os.getpid(), signal.SIGKILL)

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), Killer()]
sys.exit(cli.main())
"""
STEPS = ("--train.steps", "30", "--train.warmup", "5")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "horovodrun --gloo"])
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_two_ranks_follow_the_curve_of_one(curve, framework: str, launcher: str) -> None:
    one = losses(curve(framework, 1, *STEPS))
    two = losses(curve(framework, 2, *STEPS, launcher=launcher))
    assert len(one) == len(two) == 30
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert one[-1] < one[0] - 0.5


@pytest.mark.parametrize("model", ["gpt", "llama", "rnn", "gru", "lstm"])
def test_both_frameworks_follow_one_curve(curve, model: str) -> None:
    options = (*STEPS, "--model.name", model, "--data.sampling", "sequential")
    torch, tensorflow = (losses(curve(framework, 1, *options)) for framework in ("torch", "tensorflow"))
    assert max(abs(a - b) for a, b in zip(torch, tensorflow, strict=True)) < 1e-3


def test_a_resumed_run_goes_on_bit_for_bit(curve, tmp_path: Path) -> None:
    whole = losses(curve("torch", 2, *STEPS))
    run = tmp_path / "run"
    options = ["--log.run", str(run), *SMALL, *STEPS, "--checkpoint.every", "10"]
    killed = launch("mpirun", 2, ["-c", KILLED_AFTER_STEP_25, *options])
    assert killed.returncode != 0
    finished = launch("mpirun", 2, ["-m", "hvdlm", *options, "--checkpoint.resume", "auto"])
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert losses(run) == whole
