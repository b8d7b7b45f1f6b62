"""Garbage collections: a run's steps don't examine what was imported, and the Python API leaves them as they were."""

from __future__ import annotations

import gc
from pathlib import Path

import hvdlm
from launching import ONE_LAYER, SMALL, run_python, with_step_hook

HOOK = "import gc; assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] == 100_000; print('left out')"


def test_steps_of_a_command_leave_imports_out(tmp_path: Path) -> None:
    options = [*SMALL, *ONE_LAYER, "--log.run", str(tmp_path / "run"), "--train.steps", "1"]
    done = run_python([*with_step_hook(HOOK), *options], HVDLM_TEST_WARM="")
    assert done.returncode == 0 and "left out" in done.stdout, done.stderr


def test_the_python_api_changes_no_collections(tmp_path: Path) -> None:
    threshold, left_out = gc.get_threshold(), gc.get_freeze_count()
    options = {"model.layers": 1, "model.width": 16, "model.heads": 1, "train.steps": 1, "log.progress": False}
    hvdlm.train(hvdlm.Config.load({**options, "log.run": str(tmp_path / "run")}))
    # Of what the tests have left out, some objects may have been freed.
    assert gc.get_threshold() == threshold and gc.get_freeze_count() <= left_out
