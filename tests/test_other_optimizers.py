"""A run that is resumed with another optimizer than the one that trained it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders import parameters, small_trainable, token_batch
from hvdlm.checkpoints.discovery import find
from hvdlm.checkpoints.load import open_checkpoint
from hvdlm.protocols.state_dict import FIRST_STEP
from launching import SMALL, run_python

STEP = 1000


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_adamws_first_updates_after_sgd_are_those_of_a_new_run(framework: str) -> None:
    """Bias of moments that begin with zeros is corrected as in a run's step 0."""
    before = small_trainable(framework, optimizer="sgd", momentum=0.0)
    state = before.state()
    new, resumed = (small_trainable(framework, beta2=0.99, clip=0.0) for _ in range(2))
    new.load_state(state)
    resumed.load_state(state | {FIRST_STEP: np.array(STEP, np.float64)})
    for step in range(3):
        batch = token_batch(step)
        new.train_step([batch], 1e-3, step)
        resumed.train_step([batch], 1e-3, STEP + step)
    assert resumed.state()[FIRST_STEP] == STEP and FIRST_STEP not in new.state()
    expected = parameters(new)
    for name, array in parameters(resumed).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(("first", "second", "counts"), [("sgd", "adamw", True), ("adamw", "adamw", False)])
def test_the_step_is_kept_by_checkpoints(tmp_path: Path, first: str, second: str, counts: bool) -> None:
    run = tmp_path / "run"
    for rule, steps in ((first, 2), (second, 3), (second, 4)):
        options = ["--train.optimizer", rule, "--train.steps", str(steps), "--train.eval_every", "0"]
        options += ["--log.run", str(run), "--checkpoint.resume", "auto", "--data.cache", str(tmp_path / "cache")]
        done = run_python(["-m", "hvdlm", *SMALL, *options])
        assert done.returncode == 0, done.stderr
    newest = find(run, "auto")
    assert newest is not None
    checkpoint = open_checkpoint(newest.path)
    assert checkpoint.step == 4 and (FIRST_STEP in checkpoint.tensors) == counts
