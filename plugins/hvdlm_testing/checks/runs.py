"""Checks of whole runs: the training loop trains a task, saves checkpoints, and resumes from one of them."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.io import safe_files
from hvdlm.protocols.types import StepResult
from hvdlm.training import run, run_lock
from hvdlm.training.loop import train
from hvdlm.training.signals import Signals
from hvdlm_testing.checks.harness import Findings, Harness, Skip
from hvdlm_testing.checks.models import trained_models
from hvdlm_testing.plugin_under_test import PluginUnderTest

_STEPS, _SAVED = 4, 2
_TEXT = "the quick brown fox jumps over the lazy dog, and runs away\n" * 40


class _Records:
    """Collects the losses, the evaluations and the checkpoints of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self.saved: list[Path] = []

    @hookimpl
    def hvdlm_step_ended(self, result: StepResult) -> None:
        """Add the step's loss."""
        self.losses.append(float(result.loss))

    @hookimpl
    def hvdlm_evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Add the figures of an evaluation."""
        self.evaluations.append(metrics)

    @hookimpl
    def hvdlm_checkpoint_saved(self, path: str) -> None:
        """Add the checkpoint's folder."""
        self.saved.append(Path(path))


def check_task_run(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Run the task of the plugin's configuration to checkpoints and an evaluation, and resume it."""
    label = f"task {plugin.name} in {harness.framework_name}"
    with _folder(harness) as folder:
        whole = _check_run(harness, harness.config(plugin), folder, label, findings)
    findings.require(all(map(math.isfinite, whole.losses)), f"{label}: a loss is not finite: {whole.losses}.")
    for figures in whole.evaluations or [{}]:
        valid = figures and all(isinstance(k, str) and isinstance(v, float | int) for k, v in figures.items())
        findings.require(valid, f"{label}: metrics returns {figures!r}, expected figures by name.")


def check_framework_run(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Run language models to checkpoints, and resume them; a recurrent one carries its state from step to step."""
    if harness.framework_name != plugin.name:
        raise Skip(f"the runs of {harness.framework_name} are its own plugin's to test")
    for model in trained_models(harness, plugin):
        check_text_run(harness, model, findings)


def check_text_run(harness: Harness, model: str, findings: Findings, zero: int = 0) -> None:
    """Run a language model to a checkpoint, and resume it; all but GPTs may carry a state from step to step."""
    with _folder(harness) as folder:
        text = folder / "text.txt"
        if harness.world.rank == 0:
            text.write_text(_TEXT)
        harness.world.gather_objects(None)
        config = harness.config()
        config.model.name, config.data.path, config.data.tokenizer = model, [str(text)], "byte"
        config.data.sampling = "shuffled" if model == "gpt" else "sequential"
        config.parallel.zero = zero  # type: ignore[assignment]
        label = f"{model} in {harness.framework_name} over {harness.base.backend}"
        _check_run(harness, config, folder / model, label, findings)


def _check_run(harness: Harness, config: Config, folder: Path, label: str, findings: Findings) -> _Records:
    """Compare a run with its resumption from a checkpoint in its middle; return what the whole run was."""
    config = copy.deepcopy(config)
    config.train = replace(config.train, steps=_STEPS, warmup=0, schedule="constant", eval_every=0)
    config.checkpoint = replace(config.checkpoint, every=_SAVED, keep=_STEPS)
    config.log = replace(config.log, progress=False, sample_tokens=0)
    whole = _train(harness, config, folder / "whole", "none")
    steps = [path.name for path in whole.saved]
    if not findings.require(len(steps) == _STEPS // _SAVED, f"{label}: a run saved {steps}, not every {_SAVED} steps."):
        return whole
    resumed = _train(harness, config, folder / "resumed", str(whole.saved[0]))
    findings.require(
        np.allclose(resumed.losses, whole.losses[_SAVED:], atol=1e-5),
        f"{label}: resumed from the checkpoint of step {_SAVED}, the losses are {_text(resumed.losses)}, in the run "
        f"that wrote it {_text(whole.losses[_SAVED:])}.",
    )
    return whole


def _train(harness: Harness, config: Config, folder: Path, resume: str) -> _Records:
    """Run ``config`` with the harness's ranks and framework; return what it reported."""
    config = copy.deepcopy(config)
    config.log.run, config.checkpoint.resume = str(folder), resume
    plan = run.plan(config)
    records, world = _Records(), harness.world
    lock = run_lock.hold(folder, world.rank, world.local_rank)
    try:
        opened = run.open_task(plan)
        started = run.build(run.Connected(**vars(opened), framework=harness.framework, world=world, lock=None))
        started.manager.register(records)
        train(started, Signals(world.rank))
    finally:
        if lock:
            lock.release()
    return records


@contextmanager
def _folder(harness: Harness) -> Iterator[Path]:
    """Make a folder that all ranks share; delete it at the end."""
    made = tempfile.mkdtemp(prefix="hvdlm-conformance-") if harness.world.rank == 0 else ""
    folder = Path(harness.world.broadcast_object(made))
    try:
        yield folder
        harness.world.gather_objects(None)
    finally:
        if harness.world.rank == 0:
            safe_files.delete_folder(folder)


def _text(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)
