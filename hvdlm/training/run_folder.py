"""The files that describe a run in its folder: config.yaml, tokenizer.json, status.json, sample.txt."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hvdlm.checkpoints import retention
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files, safe_yaml, untrusted_input
from hvdlm.io.atomic_files import replace
from hvdlm.telemetry.tensorboard import EVENTS
from hvdlm.training import run_lock

if TYPE_CHECKING:
    from hvdlm.training.run import Run

_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "status.json", "sample.txt")
_SECTIONS = {"model", "data", "train", "checkpoint", "log"}
_CONFIG_BYTES = 2**18


def open_folder(run: Run) -> None:
    """Delete an earlier run if asked to, set aside later checkpoints; write config.yaml and tokenizer.json.

    All ranks call; rank 0 writes the files.
    """
    if run.config.log.overwrite and not run.checkpoint:
        if run.world.local_rank == 0:
            clear(run.folder)  # every node may have one
        run.world.gather_objects(None)
    run.saver.continue_from(run.checkpoint)
    if run.world.rank != 0:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(run.folder)
    replace(run.folder / "config.yaml", yaml.safe_dump(run.requested.to_dict(), sort_keys=False))
    replace(run.folder / "tokenizer.json", json.dumps(run.task.tokenizer.to_json()))


def _delete_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    names = "|".join(re.escape(name) for name in (*_FILES, run_lock.NAME.removeprefix(".")))
    safe_files.delete_owned(folder, rf"\.({names})(\.[0-9a-f]{{8}})?\.partial")


def keep_sample(run: Run, text: str) -> None:
    """Write the text that a run generated at its end to sample.txt. Rank 0 calls."""
    replace(run.folder / "sample.txt", text)


def clear(folder: Path) -> None:
    """Delete what an earlier run wrote into ``folder``, and nothing else.

    Raises:
        HvdlmError: something can't be deleted, so that the earlier run would be taken for this one.
    """
    try:
        for name in _FILES:
            safe_files.delete_file(folder / name)
        retention.delete_all(folder / "checkpoints")
        events = folder / "tensorboard"
        if safe_files.kind(events) == "symbolic link":
            safe_files.delete_file(events)
        safe_files.delete_owned(events, EVENTS)
    except OSError as error:
        raise HvdlmError(
            f"log.overwrite: the run in {folder} can't be deleted: {error.filename}: {error.strerror}: delete it "
            "yourself, or name another folder (--log.run NAME)."
        ) from error


def check_foreign(folder: Path, has_checkpoint: bool) -> None:
    """Check that the files in ``folder`` that a run would replace are those of a run.

    ``has_checkpoint``: whether there is a run's checkpoint in it, which is proof enough.

    Raises:
        HvdlmError: they aren't.
    """
    if has_checkpoint or _is_run(folder):
        return
    foreign = next((name for name in _FILES if safe_files.kind(folder / name) not in (None, "symbolic link")), None)
    if foreign:
        raise HvdlmError(
            f"log.run {folder}: {foreign} there isn't that of a run, and would be replaced: name a folder of its own."
        )


def _is_run(folder: Path) -> bool:
    """Return whether config.yaml in ``folder`` is the complete configuration that a run writes."""
    try:
        text = untrusted_input.read(folder / "config.yaml", _CONFIG_BYTES).decode()
        content = safe_yaml.load(text, yaml.safe_load)
    except (ValueError, OSError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and _SECTIONS <= {name for name, value in content.items() if type(value) is dict}


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
