"""The lock on writing a token folder in the cache: those who wait name its owner, and wait only while it is alive."""

from __future__ import annotations

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
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import file_lock
from hvdlm_corpora import cache, preparation, write_lock

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
    process.timeout = 1.2
    monkeypatch.setattr(write_lock, "SILENT_BEATS", 0)
    monkeypatch.setattr(file_lock, "_REPORT", 0.3)
    yield
    process.reset()


def corpus(folder: Path) -> tuple[DataConfig, Path]:
    """Return a small corpus, and the lock of its token folder."""
    text = folder / "corpus.txt"
    text.write_text("a few words for a token folder " * 100)
    config = DataConfig(path=str(text), cache=str(folder / "cache"), context=8)
    (folder / "cache").mkdir()
    return config, folder / "cache" / f".{cache.key(config)}.lock"


def test_a_lock_that_is_held_elsewhere_is_a_sentence(tmp_path: Path) -> None:
    config, lock = corpus(tmp_path)
    with (
        held_elsewhere(lock) as pid,
        pytest.raises(HvdlmError, match=rf"{lock} is held by process {pid}, which has shown no sign .*--data.cache"),
    ):
        preparation.prepare(config)
    assert preparation.prepare(config)  # the holder was killed


def test_an_owner_that_is_alive_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, lock = corpus(tmp_path)
    began = time.monotonic()
    with held_elsewhere(lock) as pid:
        for tenth in range(1, 25):
            threading.Timer(tenth / 10, os.utime, (lock,)).start()
        with pytest.raises(HvdlmError, match=rf"is held by process {pid}"):
            preparation.prepare(config)
    assert time.monotonic() - began > 2.4 + 1.2
    assert f"is held by process {pid}: waiting until it is done" in capsys.readouterr().err
