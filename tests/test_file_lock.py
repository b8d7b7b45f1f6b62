"""Locks: who holds one, how a dead owner is recognised, and what happens where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders import file_names, read_json
from hvdlm.io import file_lock, lock_owner
from hvdlm.io.file_lock import FileLock, Held, acquire
from launching import environment, run_python, wait_until

HOLD = """
import sys, time
from pathlib import Path
from hvdlm.io import file_lock
file_lock.BEAT = 0.2
lock = file_lock.acquire(Path(sys.argv[1]), launch=sys.argv[2], job="Slurm job 12")
print("held", flush=True)
{action}
sys.stdin.read()
"""


@contextmanager
def holding(path: Path, launch: str = "", action: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds the lock ``path`` until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(action=action), str(path), launch],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "_PATIENCE", 0.3)
    monkeypatch.setattr(file_lock, "STALE", 1.0)
    monkeypatch.setattr(file_lock, "_REPORT", 0.5)


def lines() -> tuple[list[str], dict]:
    printed: list[str] = []
    return printed, {"say": printed.append}


def test_a_living_owner_is_named_with_host_pid_and_time(tmp_path: Path) -> None:
    with holding(tmp_path / "lock") as owner:
        with pytest.raises(Held) as refused:
            acquire(tmp_path / "lock")
        assert f"process {owner.pid} on {socket.gethostname()} (since 20" in str(refused.value)
        assert "Slurm job 12)" in str(refused.value)
        os.kill(owner.pid, signal.SIGSTOP)  # suspended is not dead
        with pytest.raises(Held):
            acquire(tmp_path / "lock")


def test_a_killed_owners_lock_is_taken_over_and_a_line_says_so(tmp_path: Path) -> None:
    with holding(tmp_path / "lock") as owner:
        owner.kill()
        owner.wait(10)
        printed, say = lines()
        with acquire(tmp_path / "lock", **say) as lock:
            assert lock.taken_over is not None and lock.taken_over.pid == owner.pid
            assert len(printed) == 1 and f"process {owner.pid}" in printed[0] and "taken over" in printed[0]
    assert file_names(tmp_path) == []


def test_a_forked_child_does_not_keep_a_dead_owners_lock(tmp_path: Path) -> None:
    fork = "import os\nif os.fork() == 0: time.sleep(30)"
    with holding(tmp_path / "lock", action=fork) as owner:
        children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children")
        wait_until(lambda: children.read_text().split())
        child = int(children.read_text().split()[0])
        try:
            owner.kill()
            owner.wait(10)
            acquire(tmp_path / "lock").release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_ranks_of_one_launch_share_a_lock_and_others_do_not(tmp_path: Path) -> None:
    with holding(tmp_path / "lock", "launch 1"):
        shared = acquire(tmp_path / "lock", launch="launch 1")
        shared.release()
        assert file_names(tmp_path) == ["lock"]
        for launch in ("launch 2", ""):
            with pytest.raises(Held):
                acquire(tmp_path / "lock", launch=launch)


def write_owner_elsewhere(path: Path) -> None:
    """Write a lock as a process of another host does."""
    path.touch()
    owner = lock_owner.this_process("", "", path.stat().st_ino).__dict__
    path.write_text(json.dumps(owner | {"host": "node7", "boot": "another", "pid": 12}))


def test_an_owner_elsewhere_lives_while_its_lock_changes(tmp_path: Path) -> None:
    write_owner_elsewhere(tmp_path / "lock")
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.2):
            os.utime(tmp_path / "lock", (1, time.monotonic()))  # the clock of that host may be wrong

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held, match="process 12 on node7"):
            acquire(tmp_path / "lock")
    finally:
        over.set()
        thread.join(10)
    printed, say = lines()
    with acquire(tmp_path / "lock", **say):  # it no longer changes
        assert "looking whether it is alive" in printed[0] and "process 12 on node7" in printed[1], printed
        assert read_json(tmp_path / "lock")["pid"] == os.getpid()


def test_a_lock_that_a_dead_host_keeps_is_replaced(tmp_path: Path) -> None:
    write_owner_elsewhere(tmp_path / "lock")
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a server does until it notices that a client is dead
        with acquire(tmp_path / "lock"), (tmp_path / "lock").open() as new, pytest.raises(BlockingIOError):
            fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert file_names(tmp_path) == []


def without_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_of_the_file_system_processes_are_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)
    with holding(tmp_path / "lock"):
        with pytest.raises(Held):
            acquire(tmp_path / "lock")
        owner = read_json(tmp_path / "lock")
        (tmp_path / "lock").write_text(json.dumps(owner | {"started": "1"}))  # its pid belongs to another process now
        acquire(tmp_path / "lock").release()


def test_without_locks_one_of_several_at_once_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock)
    results: list[FileLock | None] = []

    def attempt() -> None:
        try:
            results.append(file_lock._Attempt(tmp_path / "lock", False, "", "", print).acquire())
        except Held:
            results.append(None)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    locks = [lock for lock in results if lock]
    assert len(results) == 4 and len(locks) == 1
    locks[0].release()


COUNT = """
import sys
from pathlib import Path
from hvdlm.io import file_lock
folder = Path(sys.argv[1])
for _ in range(10):
    with file_lock.acquire(folder / "lock", wait=True):
        (folder / "count").write_text(str(int((folder / "count").read_text()) + 1))
"""


def test_processes_that_wait_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "count").write_text("0")
    code = COUNT.replace("folder = ", "file_lock._POLL = 0.01\nfolder = ")
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment()) for _ in range(4)]
    assert [process.wait(60) for process in others] == [0] * 4
    assert (tmp_path / "count").read_text() == "40" and file_names(tmp_path) == ["count"]


def test_who_waits_says_for_whom(tmp_path: Path) -> None:
    with holding(tmp_path / "lock") as owner:
        assert owner.stdin is not None
        threading.Timer(1.5, owner.kill).start()
        printed, say = lines()
        with acquire(tmp_path / "lock", wait=True, **say):
            assert f"process {owner.pid}" in printed[0] and "waiting until it is done" in printed[0]


@pytest.mark.parametrize("replaced", [True, False])
def test_an_owner_whose_lock_was_taken_over_ends(tmp_path: Path, replaced: bool) -> None:
    with holding(tmp_path / "lock") as owner:
        if replaced:
            (tmp_path / "lock").unlink()
        write_owner_elsewhere(tmp_path / "lock")
        assert owner.wait(10) == 1 and owner.stderr is not None
        assert "is held by another process now" in owner.stderr.read()


def test_a_copy_of_a_locked_folder_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with holding(tmp_path / "a" / "lock"):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        acquire(tmp_path / "b" / "lock").release()
        assert file_names(tmp_path / "a") == ["lock"] and file_names(tmp_path / "b") == []


@pytest.mark.parametrize("content", ["mine", "{}", '{"pid": 1}', "[1]", "[" * 100_000])
def test_a_file_that_is_no_lock_stays_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes").write_text(content)
    with pytest.raises(OSError, match="not a lock that hvdlm wrote"):
        acquire(tmp_path / "notes")
    (tmp_path / "lock").symlink_to(tmp_path / "notes")
    with pytest.raises(OSError, match="symbolic link"):
        acquire(tmp_path / "lock")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        acquire(tmp_path / "pipe")
    assert (tmp_path / "notes").read_text() == content and (tmp_path / "lock").is_symlink()


def test_a_lock_of_another_version_is_respected_and_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"pid": 12, "host": "node7\\u001b[31m", "new": [1]}')
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Held, match=r"process 12 on node7\[31m"):
            acquire(tmp_path / "lock")
    acquire(tmp_path / "lock").release()


def test_zeros_that_a_crash_left_behind_are_no_owner(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(bytes(300))
    with acquire(tmp_path / "lock"), acquire(tmp_path / "lock"):  # once more in the same process
        assert read_json(tmp_path / "lock")["pid"] == os.getpid()


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with holding(file_lock.beside(tmp_path / "tokens")):
        prepare = ["-m", "hvdlm", "prepare", "--data.path", "embedded", "--output", str(tmp_path / "tokens")]
        done = run_python(prepare, timeout=60)
        assert done.returncode == 2 and "is writing it: wait" in done.stderr, done.stderr
        assert file_names(tmp_path) == [".tokens.lock"]
    assert run_python(prepare, timeout=60).returncode == 0 and file_names(tmp_path) == ["tokens"]
