"""The files that describe a run in its folder: config.yaml, tokenizer.json, status.json, sample.txt."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hvdlm import hookimpl
from hvdlm.checkpoints import retention
from hvdlm.errors import BAD_INPUT, FAILED, STOPPED, HvdlmError, RankError
from hvdlm.io import safe_files, safe_yaml, untrusted_input
from hvdlm.io.atomic_files import overwrite, replace
from hvdlm.io.folder_identity import FolderIdentity
from hvdlm.telemetry.observers import Observers
from hvdlm.training import run_lock
from hvdlm.training.signals import Signals

if TYPE_CHECKING:
    from hvdlm.training.run import Run

_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "status.json", "sample.txt")
_EVENTS = r"events\.out\.tfevents\..+\.hvdlm"  # in tensorboard/: other programs' files may lie beside them
_TRACES = r"(\.?)steps-\d+-\d+-rank-\d+\.json(\.[0-9a-f]{8}\.partial)?"  # in profile/
_SECTIONS = {"model", "data", "train", "checkpoint", "log"}
_CONFIG_BYTES = 2**18


def open_folder(run: Run) -> None:
    """Delete an earlier run if asked to, set aside later checkpoints; write config.yaml and tokenizer.json.

    All ranks call; rank 0 writes the files.

    Raises:
        HvdlmError: the folder can't be written.
    """
    if run.config.log.overwrite and not run.checkpoint:
        if run.world.local_rank == 0:
            clear(run.folder)  # every node may have one
        run.world.gather_objects(None)
    run.saver.continue_from(run.checkpoint)
    if run.world.rank == 0:
        try:
            _write_description(run)
        except OSError as error:
            raise run_lock.unwritable(run.folder, error) from error


def _write_description(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(run.folder)
    run.identity = FolderIdentity(run.folder)
    replace(run.folder / "config.yaml", yaml.safe_dump(run.requested.to_dict(), sort_keys=False))
    replace(run.folder / "tokenizer.json", json.dumps(run.task.tokenizer.to_json()))


def _delete_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote."""
    names = "|".join(re.escape(name) for name in (*_FILES, run_lock.NAME.removeprefix(".")))
    safe_files.delete_owned(folder, rf"\.({names})(\.[0-9a-f]{{8}})?\.partial")


def clear(folder: Path) -> None:
    """Delete what an earlier run wrote into ``folder``, and nothing else.

    Raises:
        HvdlmError: something can't be deleted, so that the earlier run would be taken for this one.
    """
    try:
        for name in _FILES:
            safe_files.delete_file(folder / name)
        retention.delete_all(folder / "checkpoints")
        for name, files in (("tensorboard", _EVENTS), ("profile", _TRACES)):
            if safe_files.kind(folder / name) == "symbolic link":
                safe_files.delete_file(folder / name)
            safe_files.delete_owned(folder / name, files)
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
    """``RUN/status.json``: how the run stands, which step it has reached, and the warnings that were printed.

    The state is ``running``, ``interrupted`` (was asked to stop and has not saved yet), or at the end ``done``,
    ``stopped`` (saved, can be resumed) or ``failed``. Written by rank 0 at the start, at every checkpoint, when the run
    is asked to stop, and at the end; a run that was killed leaves ``running`` or ``interrupted`` behind.
    """

    observer = False

    def __init__(self, run: Run, observers: Observers, signals: Signals) -> None:
        self._path = run.folder / "status.json" if run.world.rank == 0 else None
        self._run = run
        self._observers = observers
        self._signals = signals
        self._lock = threading.Lock()  # a signal's thread writes, too
        self._ended = False
        self._step_seconds = math.inf  # the fastest step: others were delayed by something
        self._step_ended = -math.inf
        self._save_seconds = 0.0
        self.step = run.start_step
        signals.checkpoint = run.start_step or None
        signals.on_request = self.interrupted

    def __enter__(self) -> Status:
        if self._signals.received:
            self.interrupted("signal")
        else:
            self._try_to_write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is not None:
            code = BAD_INPUT if isinstance(error, HvdlmError) else FAILED
            self._try_to_write("failed", f"{type(error).__name__}: {error}", code)

    @hookimpl
    def hvdlm_step_ended(self) -> None:
        """Note how long a step takes with all that plugins do, and compare the time to stop with the launcher's limit.

        Of the first step, which builds graphs, only the end counts.
        """
        self._step_seconds = min(self._step_seconds, time.monotonic() - self._step_ended)
        self._step_ended = time.monotonic()
        self._compare_with_limit()

    @hookimpl
    def hvdlm_checkpoint_saved(self, step: int, total_seconds: float) -> None:
        """Write that the run has come so far."""
        self._signals.checkpoint = step
        self._save_seconds = total_seconds
        self._compare_with_limit()
        if not self._signals.received:
            self._try_to_write("running")

    def _compare_with_limit(self) -> None:
        if self._step_seconds < math.inf:  # ranks agree to stop after one more step
            self._signals.warn_of_limit(2 * self._step_seconds + self._save_seconds)

    def interrupted(self, reason: str, code: int | None = None) -> None:
        """Note that the run was asked to stop; ``code``: it ends at once, with this exit code."""
        self._try_to_write("interrupted", reason, code)

    def ended(self, reason: str | None, code: int) -> None:
        """Write that the run has saved and ended normally, with this exit code; ``reason``: why before its last step.

        Raises:
            RankError: it could not be written.
        """
        try:
            self._write("stopped" if code == STOPPED else "done", reason, code)
        except OSError as error:
            raise RankError(f"{self._path} could not be written: {error.strerror}.") from error

    def _try_to_write(self, state: str, reason: str | None = None, code: int | None = None) -> None:
        try:
            self._write(state, reason, code)
        except OSError as error:
            self._observers.warn_once(f"{self._path} could not be written: {error.strerror}. It is out of date.")

    def _write(self, state: str, reason: str | None, code: int | None) -> None:
        if self._path is None:
            return
        status = {"state": state, "step": self.step, "reason": reason, "code": code, "time": time.time()}
        status |= {"pid": os.getpid(), "warnings": self._observers.warnings}
        ends = state not in ("running", "interrupted")
        with self._lock:
            if self._ended and not ends:
                return
            if self._run.identity is not None and not self._run.identity.is_same():
                return  # the folder may be another run's now
            text = json.dumps(status) + "\n"
            try:
                replace(self._path, text)
            except OSError:
                overwrite(self._path, text)  # the blocks of the old file are there even where the disk is full
            self._ended = ends
