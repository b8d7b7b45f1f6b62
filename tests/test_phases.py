"""The phases of processes that are not connected: what they see of each other, their limits, and how they end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hvdlm.diagnostics import failure_files, phases, watchdog
from hvdlm.diagnostics.failure_files import Failure
from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.diagnostics.phases import TRAINING, Process
from hvdlm.diagnostics.watchdog import Watchdog
from hvdlm_diagnosis.recorder_reader import read_diagnosis
from launching import run_python, wait_until

# A rank's abort does not return: here, it ends the thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
WAITING = "waiting for the other ranks to connect"


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "STARTUP_SECONDS", 0.0)
    monkeypatch.setattr(phases, "_BEAT_SECONDS", 0.1)
    for name in ("STACK", "TURN", "ABORT"):
        monkeypatch.setattr(watchdog, f"_{name}_SECONDS", 0.3)


class Ranks:
    """Ranks of one launch in this process, which share a folder and record the codes with which they end."""

    def __init__(self, folder: Path, size: int, present: tuple[int, ...]) -> None:
        self.codes: dict[int, list[int]] = {rank: [] for rank in present}
        self.processes = {rank: self._process(folder, rank, size) for rank in present}
        self._watchdogs: list[Watchdog] = []

    def _process(self, folder: Path, rank: int, size: int) -> Process:
        process = Process()
        process.rank, process.timeout, process.abort = rank, 0.5, lambda code: self._abort(rank, code)
        process.share(folder, size)
        return process

    def _abort(self, rank: int, code: int) -> None:
        self.codes[rank].append(code)
        raise SystemExit(code)

    def watch(self) -> None:
        for process in self.processes.values():
            self._watchdogs.append(Watchdog(process, poll=0.05))
            self._watchdogs[-1].start()

    def stop(self) -> None:
        for watcher in self._watchdogs:
            watcher.stop()


@pytest.fixture
def contexts() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_ranks(contexts: ExitStack, folder: Path, size: int, present: tuple[int, ...]) -> Ranks:
    ranks = Ranks(folder / "flight_recorder", size, present)
    contexts.callback(ranks.stop)
    return ranks


def test_ranks_that_never_arrive_are_named_once(
    tmp_path: Path, contexts: ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = make_ranks(contexts, tmp_path, 5, (0, 1))
    for process in ranks.processes.values():
        contexts.enter_context(process.during(WAITING, patience=1.0, waits=True))
    ranks.watch()
    wait_until(lambda: all(ranks.codes.values()), 20)
    output = capfd.readouterr().err
    assert output.count("the run hangs") == 1 and "Not arrived: ranks 2-4, which have not begun" in output, output
    assert f"Rank 0 has been {WAITING}" in output or f"Rank 1 has been {WAITING}" in output
    assert list(ranks.codes.values()) == [[1], [1]]
    assert "Not arrived: ranks 2-4" in read_diagnosis(tmp_path / "flight_recorder")


def test_a_rank_at_work_is_waited_for_up_to_its_own_limit(
    tmp_path: Path, contexts: ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = make_ranks(contexts, tmp_path, 2, (0, 1))
    contexts.enter_context(ranks.processes[0].during(WAITING, patience=1.0, waits=True))
    contexts.enter_context(ranks.processes[1].during("preparing the data", patience=6.0))  # 3 s
    began = time.monotonic()
    ranks.watch()
    wait_until(lambda: all(ranks.codes.values()), 20)
    assert 2.9 < time.monotonic() - began < 10
    output = capfd.readouterr().err
    assert output.count("the run hangs") == 1 and "preparing the data, for 3 s" in output, output


def test_a_stopped_or_killed_rank_is_not_waited_for(
    tmp_path: Path, contexts: ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = make_ranks(contexts, tmp_path, 2, (0, 1))
    contexts.enter_context(ranks.processes[0].during(WAITING, patience=1.0, waits=True))
    contexts.enter_context(ranks.processes[1].during("importing torch", patience=1000.0))
    ranks.processes[1].write(force=True)
    del ranks.processes[1]  # nothing writes its file any more
    ranks.watch()
    wait_until(lambda: ranks.codes[0], 20)
    assert f"Rank 1 (process {os.getpid()} on " in (output := capfd.readouterr().err)
    assert "importing torch" in output and "it was stopped or killed" in output, output


def test_a_phase_without_limit_is_waited_for(tmp_path: Path, contexts: ExitStack) -> None:
    ranks = make_ranks(contexts, tmp_path, 1, (0,))
    with ranks.processes[0].during("reading standard input", patience=math.inf):
        ranks.watch()
        time.sleep(1.5)
        assert ranks.codes[0] == []
    wait_until(lambda: ranks.codes[0], 20)  # in the phase around it


def train_beside(ranks: Ranks, phase: str) -> None:
    """Let rank 0 wait in a collective of a step, for rank 1, which is in ``phase`` with twice the usual patience."""
    for rank, process in ranks.processes.items():
        process.connect(FlightRecorder(rank, 2), process.abort)
        process.begin(TRAINING)
    ranks.processes[1].begin(phase)
    ranks.processes[1].phase.patience = 4.0  # 2 s
    recorder = ranks.processes[0].recorder
    assert recorder is not None
    recorder.begin("all_reduce", "gradients.0", recorder.recorded_group((0, 1)))


def test_a_rank_that_compiles_is_waited_for(
    tmp_path: Path, contexts: ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = make_ranks(contexts, tmp_path, 2, (0, 1))
    train_beside(ranks, "compiling a step")
    began = time.monotonic()
    ranks.watch()
    wait_until(lambda: ranks.codes[1], 20)
    assert time.monotonic() - began > 1.9 and "the run hangs" in capfd.readouterr().err


def test_a_rank_that_trains_is_not_waited_for(
    tmp_path: Path, contexts: ExitStack, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = make_ranks(contexts, tmp_path, 2, (0, 1))
    train_beside(ranks, "training")
    for process in ranks.processes.values():
        process.write(force=True)
    began = time.monotonic()
    ranks.watch()
    wait_until(lambda: ranks.codes[0], 20)
    assert time.monotonic() - began < 1.9 and "the run hangs" in capfd.readouterr().err


def test_an_error_before_connecting_ends_the_other_ranks(tmp_path: Path, contexts: ExitStack) -> None:
    ranks = make_ranks(contexts, tmp_path, 2, (0, 1))
    contexts.enter_context(ranks.processes[0].during(WAITING, patience=1000.0, waits=True))
    folder = ranks.processes.pop(1).folder
    ranks.watch()
    failure_files.write_failure(folder, Failure(1, "there is no Horovod", code=2))
    failure_files.create_marker(folder, failure_files.REPORTED)
    wait_until(lambda: ranks.codes[0], 20)
    assert ranks.codes[0] == [2]


def test_phase_files_of_a_stranger_are_read_with_care(tmp_path: Path, contexts: ExitStack) -> None:
    ranks = make_ranks(contexts, tmp_path, 9, (0,))
    folder = ranks.processes[0].folder
    assert folder is not None
    good = {"phase": "\x1b[31mred\n", "host": "h", "beat": 1, "waits": False, "pid": 1, "seconds": 2.0}
    damaged = [{}, [], {**good, "pid": "x"}, {**good, "seconds": None}, {**good, "seconds": 10**400}]
    for rank, content in enumerate([good, *damaged], 1):
        (folder / f"phase-{rank:04d}.json").write_text(json.dumps(content))
    (folder / "phase-0007.json").write_text("[" * 100000)
    (folder / "phase-0008.json").symlink_to("/dev/zero")
    assert set(failure_files.read_phases(folder)) == {0, 1}
    text = ranks.processes[0].describe()
    assert "Rank 1 (process 1 on h): ?[31mred" in text and "\x1b" not in text and "Not arrived: ranks 2-8" in text


def test_a_normal_end_leaves_no_files_of_phases(tmp_path: Path) -> None:
    folder = tmp_path / "flight_recorder"
    left_behind = folder / "attempt-0123456789ab"
    left_behind.mkdir(parents=True)
    (left_behind / "phase-0000.json").write_text("{}")
    (folder / "attempt-elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.json").write_text("{}")
    processes = Ranks(folder, 2, (0, 1)).processes
    assert not left_behind.exists()
    for process in processes.values():
        assert process.attempt is not None and (process.attempt / f"phase-{process.rank:04d}.json").exists()
    for process in processes.values():
        process.discard()
    assert [path.name for path in folder.iterdir()] == ["attempt-elsewhere"]
    assert (tmp_path / "elsewhere" / "mine.json").exists()


SLOW_EXIT = """
import atexit, sys, time
from hvdlm.diagnostics import phases
from hvdlm.diagnostics.watchdog import watching
phases.STARTUP_SECONDS = 0.0
atexit.register(time.sleep, 1000)
with watching() as watchdog:
    phases.process.timeout = 0.5
    watchdog.code = 75
sys.exit(75)
"""


def test_an_exit_that_hangs_keeps_the_exit_code() -> None:
    done = run_python(["-c", SLOW_EXIT], timeout=30)
    assert done.returncode == 75 and "exit handlers or threads of libraries have not for" in done.stderr, done.stderr


def test_a_phase_ends_with_its_block() -> None:
    process = Process()
    process.begin("first")
    with process.during("second", patience=3.0):
        assert (process.phase.name, process.limit) == ("second", 3 * phases.DEFAULT_TIMEOUT)
        with pytest.raises(ValueError), process.during("third"):
            raise ValueError
        assert process.phase.name == "second"
    assert process.phase.name == "first"
