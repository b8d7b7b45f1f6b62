"""The lock on writing a token folder: those who wait name its holder, and wait only as long as it makes progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvdlm.config import DataConfig
from hvdlm.data import preparation, writer_lock
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from launching import wait_until

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held_elsewhere(lock: Path) -> Iterator[int]:
    """Hold ``lock`` in another process, which writes nothing about itself; yield its process id."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate(timeout=20)


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    process.reset()
    process.timeout = 0.2  # so that a holder may be without progress for 1.2 s
    monkeypatch.setattr(writer_lock, "_FIRST_SECONDS", 0.3)
    yield
    process.reset()


def test_a_lock_that_is_held_elsewhere_is_a_sentence(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words for a token folder " * 100)
    config = DataConfig(path=str(corpus), cache=str(tmp_path / "cache"), context=8)
    (tmp_path / "cache").mkdir()
    lock = tmp_path / "cache" / f".{preparation.key(config)}.lock"
    with (
        held_elsewhere(lock) as pid,
        pytest.raises(HvdlmError, match=rf"{lock} has been held for \d+ s by process {pid}, without .*--data.cache"),
    ):
        preparation.prepare(config)
    assert preparation.prepare(config)  # the holder was killed


def test_a_holder_that_makes_progress_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock, began = tmp_path / "lock", time.monotonic()
    with held_elsewhere(lock) as pid:
        holder = {"pid": pid, "host": "node\x1b[31m7", "since": "today", "launch": "other"}
        lock.write_text(json.dumps(holder))
        for tenth in range(1, 25):
            threading.Timer(tenth / 10, os.utime, (lock,)).start()
        with pytest.raises(HvdlmError, match=rf"by process {pid} on node\?\?31m7 \(since today\)"):
            writer_lock.writer_lock(lock).__enter__()
    assert time.monotonic() - began > 2.4 + 1.2
    shown = capsys.readouterr().err
    assert f"waiting for process {pid} on node??31m7" in shown and "\x1b" not in shown, shown


def test_progress_of_the_main_thread_is_shown_to_waiters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.diagnostics.phases._BEAT_SECONDS", 0.05)
    lock = tmp_path / "lock"
    with writer_lock.writer_lock(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        os.utime(lock, (0, 0))

        def shown() -> bool:
            process.alive()
            return lock.stat().st_mtime > 1

        wait_until(shown, 5)
    os.utime(lock, (0, 0))
    time.sleep(0.1)
    process.alive()
    assert lock.stat().st_mtime < 1
