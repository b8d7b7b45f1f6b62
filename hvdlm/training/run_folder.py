"""The files that describe a run in its folder: config.yaml, tokenizer.json, status.json, sample.txt."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from hvdlm.io.atomic_files import replace
from hvdlm.training.run import Run

_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "status.json", "sample.txt")


def open_folder(run: Run) -> None:
    """Delete an earlier run if asked to, set aside later checkpoints; write config.yaml and tokenizer.json.

    All ranks call; rank 0 writes the files.
    """
    if run.config.log.overwrite and not run.checkpoint:
        if run.world.rank == 0:
            clear(run.folder)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # every node may have one
        run.world.gather_objects(None)
    run.saver.continue_from(run.checkpoint)
    if run.world.rank != 0:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    for leftover in run.folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    replace(run.folder / "config.yaml", yaml.safe_dump(run.requested.to_dict(), sort_keys=False))
    replace(run.folder / "tokenizer.json", json.dumps(run.task.tokenizer.to_json()))


def keep_sample(run: Run, text: str) -> None:
    """Write the text that a run generated at its end to sample.txt. Rank 0 calls."""
    replace(run.folder / "sample.txt", text)


def clear(folder: Path) -> None:
    """Delete the files of an earlier run in ``folder``, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


class Status:
    """``RUN/status.json``: running, done, stopped (saved, can be resumed) or failed, and the step.

    Written by rank 0. A run that was killed leaves ``running`` behind.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.folder / "status.json" if run.world.rank == 0 else None
        self.step = run.start_step

    def __enter__(self) -> Status:
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is not None:
            self._write("failed", f"{type(error).__name__}: {error}", 1)

    def ended(self, stopped: str | None, code: int) -> None:
        """Write that the run ended normally, with this exit code."""
        self._write("stopped" if stopped else "done", stopped, code)

    def _write(self, state: str, reason: str | None = None, code: int | None = None) -> None:
        if self._path is None:
            return
        status = {"state": state, "step": self.step, "reason": reason, "code": code, "time": time.time()}
        try:
            replace(self._path, json.dumps({**status, "pid": os.getpid()}) + "\n")
        except OSError:  # the disk may be full: the next checkpoint reports it
            pass
