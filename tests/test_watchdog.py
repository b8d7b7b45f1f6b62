"""The flight recorder's files, the diagnosis of hangs and failures, the watchdog, and how errors are reported once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm.diagnostics import abort, explanations, failure_files, phases, watchdog
from hvdlm.diagnostics.failure_files import Failure
from hvdlm.diagnostics.flight_recorder import RECORDS, FlightRecorder, clean, named_ranks, ranks_in, ranks_text
from hvdlm.diagnostics.phases import TRAINING, Process
from hvdlm.diagnostics.watchdog import Watchdog
from hvdlm.errors import HvdlmError, RankError
from hvdlm.training.batches import THREAD
from hvdlm_diagnosis import diagnosis
from hvdlm_diagnosis.recorder_reader import Entry, FailureFiles, Recording, read_files, read_recording

# A rank's abort does not return: here, it ends the thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

# The flight recorder


def make_recorder(folder: Path, rank: int = 0, size: int = 2) -> FlightRecorder:
    recorder = FlightRecorder(rank, size)
    recorder.keep_in(folder, rank)
    return recorder


def begin_all_reduce(recorder: FlightRecorder, name: str, ranks: tuple[int, ...] = (0, 1), size: int = 3) -> int:
    """Begin an all-reduce, on behalf of the caller, as a backend does."""
    return recorder.begin("all_reduce", name, recorder.recorded_group(ranks), [np.zeros((size, 2), np.float32)])


def test_recorded_collectives_are_read_back(tmp_path: Path) -> None:
    recorder = FlightRecorder(1, 2)
    recorder.end(begin_all_reduce(recorder, "gradients.0"))  # in memory, before the folder is known
    recorder.keep_in(tmp_path / "flight_recorder", 1)
    recorder.step(7)
    begin_all_reduce(recorder, "gradients.1", (0, 1, 2, 3), 5)
    recording = read_recording(tmp_path / "flight_recorder" / "rank-0001.recorder")
    assert (recording.rank, recording.size, recording.pid, recording.step) == (1, 2, os.getpid(), 7)
    first, second = recording.entries
    assert (first.sequence, first.index, first.step, first.name, first.ranks) == (1, 0, 0, "gradients.0", "0-1")
    assert 0 < first.begun <= first.ended <= time.time()
    assert (second.sequence, second.index, second.step, second.ended) == (2, 0, 7, 0.0)
    assert (second.operation, second.shape, second.dtype, second.ranks) == ("all_reduce", "[5,2]", "float32", "0-3")
    assert second.site.startswith("tests/test_watchdog.py:"), second.site


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (3, 7), (0, 2, 4, 6), (5, 3), (0, 1, 4), tuple(range(512))])
def test_rank_lists_round_trip_through_text(ranks: tuple[int, ...]) -> None:
    assert tuple(ranks_in(ranks_text(ranks))) == ranks


def test_many_ranks_are_named_in_one_short_line() -> None:
    assert named_ranks({7}) == "rank 7" and named_ranks((5, 3, 4)) == "ranks 3-5"
    assert named_ranks([0, *range(2, 65536)]) == "ranks 0,2-65535"
    scattered = [rank for rank in range(65536) if rank % 3]
    assert named_ranks(scattered).endswith(f",94-95 and {len(scattered) - 64} more")


@pytest.mark.parametrize("text", ["", "0-999999999999,5", "0-99999999999999999999999,1", "a", "1-b", "0-4/0", "1,,2"])
def test_texts_that_are_no_ranks_hold_none(text: str) -> None:
    assert tuple(ranks_in(text)) == ()


def test_a_full_ring_keeps_the_newest(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    for number in range(RECORDS + 10):
        recorder.end(begin_all_reduce(recorder, f"n{number}"))
    entries = read_recording(tmp_path / "rank-0000.recorder").entries
    assert [entry.sequence for entry in entries] == list(range(11, RECORDS + 11))
    assert entries[0].name == "n10" and all(entry.ended for entry in entries)


def test_a_late_end_does_not_alter_a_reused_record(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    late = begin_all_reduce(recorder, "late")
    for number in range(RECORDS):
        begin_all_reduce(recorder, f"n{number}")
    recorder.end(late)
    assert all(not entry.ended for entry in read_recording(tmp_path / "rank-0000.recorder").entries)


def test_collectives_in_a_graph_are_recorded_at_every_run(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    with recorder.graph(()) as calls:
        assert [begin_all_reduce(recorder, "a"), begin_all_reduce(recorder, "b")] == [0, 0]
        assert not recorder.open  # no collective of a graph times out
    with recorder.graph(calls) as again:
        entries = read_recording(tmp_path / "rank-0000.recorder").entries
        assert [(e.name, bool(e.ended), e.in_graph) for e in entries[2:]] == [("a", False, True), ("b", False, True)]
    entries = read_recording(tmp_path / "rank-0000.recorder").entries
    assert again == [] and [entry.index for entry in entries] == [0, 1, 2, 3] and all(e.ended for e in entries)


def test_a_killed_process_leaves_its_records(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from hvdlm.diagnostics.flight_recorder import FlightRecorder\n"
        "recorder = FlightRecorder(0, 2); recorder.keep_in(Path(sys.argv[1]), 0)\n"
        "recorder.begin('all_reduce', 'last', recorder.recorded_group((0, 1))); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [entry.name for entry in read_recording(tmp_path / "rank-0000.recorder").entries] == ["last"]


def test_a_truncated_recording_ends_no_rank(tmp_path: Path) -> None:
    recorder, path = make_recorder(tmp_path), tmp_path / "rank-0000.recorder"
    begin_all_reduce(recorder, "before")
    os.truncate(path, 0)
    recorder.end(begin_all_reduce(recorder, "after"))
    recorder.beat()
    recorder.flush()
    assert b"after" in path.read_bytes() and b"before" not in path.read_bytes()
    with pytest.raises(HvdlmError, match="is no flight recorder's file"):
        read_recording(path)


def damaged_recording(folder: Path, damage: str) -> Path:
    recorder, path = make_recorder(folder), folder / "rank-0000.recorder"
    recorder.end(begin_all_reduce(recorder, "gradients.0"))
    recorder.flush()
    whole, other = path.read_bytes(), folder / "other"
    if damage == "missing":
        return other
    if damage == "link":
        other.symlink_to(path)
    elif damage == "pipe":
        os.mkfifo(other)
    elif damage == "folder":
        other.mkdir()
    elif damage == "huge":
        other.touch()
        os.truncate(other, 1 << 40)
    else:
        cuts = {"empty": b"", "short": whole[:300], "cut": whole[:-1], "foreign": b"\x89PNG" + whole[4:]}
        counts = {
            "many records": whole[:12] + b"\xff\xff\xff\xff" + whole[16:],
            "rank": whole[:16] + b"\2" + whole[17:],
        }
        other.write_bytes({**cuts, **counts}[damage])
    return other


DAMAGES = ["missing", "link", "pipe", "folder", "huge", "empty", "short", "cut", "foreign", "many records", "rank"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_no_records_are_named(damage: str, tmp_path: Path) -> None:
    path = damaged_recording(tmp_path, damage)
    with pytest.raises(HvdlmError, match=r"other: .*"):
        read_recording(path)


def test_flipped_bytes_are_refused_or_printed_safely(tmp_path: Path) -> None:
    recorder, path = make_recorder(tmp_path), tmp_path / "rank-0000.recorder"
    for number in range(40):
        recorder.end(begin_all_reduce(recorder, f"n{number}"))
    recorder.flush()
    whole, random = path.read_bytes()[: 256 * 41], np.random.default_rng(1)
    short = bytearray(whole)
    short[12:16] = (40).to_bytes(4, "little")  # a recording of 40 records
    for _ in range(300):
        bad = bytearray(short)
        for index in random.integers(0, len(bad), 20):
            bad[index] = random.integers(0, 256)
        path.write_bytes(bad)
        files = read_files(tmp_path)
        if files.recordings:
            assert all(c.isprintable() or c == "\n" for c in diagnosis.report(files))
        else:
            assert len(files.unreadable) == 1


def test_a_full_disk_keeps_the_records_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    recorder = make_recorder(tmp_path / "flight_recorder")
    recorder.end(begin_all_reduce(recorder, "gradients.0"))
    recorder.step(3)
    recorder.flush()
    assert recorder.folder is None


def test_an_orderly_end_removes_only_files_of_hvdlm(tmp_path: Path) -> None:
    recorders = [make_recorder(tmp_path / "flight_recorder", rank) for rank in (0, 1)]
    recorders[0].discard()
    assert sorted(p.name for p in (tmp_path / "flight_recorder").iterdir()) == ["rank-0001.recorder"]
    recorders[1].discard()
    assert not (tmp_path / "flight_recorder").exists()
    make_recorder(tmp_path / "flight_recorder")
    (tmp_path / "flight_recorder" / "hang.json").touch()
    (tmp_path / "flight_recorder" / "notes").touch()
    clean(tmp_path / "flight_recorder")
    assert [p.name for p in (tmp_path / "flight_recorder").iterdir()] == ["notes"]


def test_recording_a_collective_takes_microseconds(tmp_path: Path) -> None:
    recorder, tensor = make_recorder(tmp_path), np.zeros((64, 64), np.float32)
    group = recorder.recorded_group((0, 1))

    def cost() -> float:
        began = time.perf_counter()
        for _ in range(2000):
            recorder.end(recorder.begin("all_reduce", "gradients.3", group, (tensor,)))
        return (time.perf_counter() - began) / 2000

    assert min(cost() for _ in range(5)) < 40e-6  # 4 to 8 on an idle core


# Diagnoses


class Scenario:
    """Synthetic recordings: every rank makes the calls that a test lists, a second apart."""

    def __init__(self, size: int) -> None:
        self.size, self.clock = size, itertools.count(1000)
        self.entries: dict[int, list[Entry]] = {rank: [] for rank in range(size)}

    def do(self, name: str, *ranks: int, group: str = "", ended: bool = True, **fields: Any) -> Scenario:
        """Have ``ranks`` (none: all) do an all-reduce."""
        for rank in ranks or range(self.size):
            before, now = self.entries[rank], float(next(self.clock))
            text = group or f"0-{self.size - 1}"
            index = sum(entry.ranks == text for entry in before)
            operation, step = fields.get("operation", "all_reduce"), fields.get("step", 0)
            known = (len(before) + 1, index, step, now, now if ended else 0.0, operation, name, text)
            entry = Entry(*known, fields.get("shape", "[8]"), "float32", fields.get("site", "model.py:1"))
            before.append(replace(entry, in_graph=fields.get("in_graph", False)))
        return self

    def steps(self, count: int) -> Scenario:
        for step in range(1, count + 1):
            for name in ("gradients.0", "gradients.1", "gradients.2", "metrics"):
                self.do(name, step=step)
        return self

    @property
    def recordings(self) -> dict[int, Recording]:
        last = {rank: entries[-1].step if entries else 0 for rank, entries in self.entries.items()}
        return {
            rank: Recording(rank, self.size, 100 + rank, "host", last[rank], 2000.0, tuple(entries))
            for rank, entries in self.entries.items()
        }

    def explanation(self, stacks: dict[int, str] | None = None) -> str:
        return diagnosis.explain(FailureFiles(self.recordings, stacks or {}), float(next(self.clock)))


def test_a_sleeping_rank_is_named_with_its_stack() -> None:
    scenario = Scenario(2).steps(3).do("gradients.0", 0, ended=False, step=4, site="gradients.py:44")
    stack = 'MainThread, the innermost call last:\n  File "hook.py", line 5, in nap\n    time.sleep(1)\n\nother, ...\n'
    output = scenario.explanation({1: stack})
    call = "all_reduce gradients.0 [8] float32 of ranks 0-1, step 4, called at gradients.py:44"
    assert f"rank 0 waits for 1 s in {call}" in output
    assert "Not arrived there: rank 1." in output and "rank 1 differs from the expected order" in output
    assert "Rank 1 (step 3, process 101 on host): its last collective, ended" in output
    assert 'File "hook.py", line 5, in nap' in output and "other" not in output


def test_a_rank_without_a_batch_shows_what_makes_it() -> None:
    stack = (
        'MainThread, the innermost call last:\n  File "/h/training/batches.py", line 5, in take\n    made.result()\n\n'
    )
    stack += f'{THREAD}, the innermost call last:\n  File "disk.py", line 7, in rows\n    read()\n\nother, ...\n'
    output = Scenario(2).steps(3).do("gradients.0", 0, ended=False, step=4).explanation({1: stack})
    assert 'File "disk.py", line 7, in rows' in output and "other" not in output and "made.result" not in output


def test_a_rank_that_skips_a_collective_is_named() -> None:
    scenario = (
        Scenario(2).steps(3).do("gradients.0", step=4).do("gradients.1", 0, step=4, site="gradients.py:44", ended=False)
    )
    scenario.do("gradients.2", step=4, site="gradients.py:45").do("metrics", step=4)
    scenario.do("gradients.0", 1, step=5, ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and (difference.index, difference.deviating) == (13, (1,))
    output = scenario.explanation()
    assert "rank 0 waits" in output and "in all_reduce gradients.1 [8] float32 of ranks 0-1, step 4" in output
    assert "Not arrived there: rank 1." in output
    assert "rank 1: all_reduce gradients.2 [8] float32 of ranks 0-1, step 4, called at gradients.py:45" in output


def test_a_rank_with_an_unusual_shape_is_named() -> None:
    scenario = Scenario(2).steps(2).do("gradients.0", 0, step=3, ended=False)
    scenario.do("gradients.0", 1, step=3, shape="[9]", site="hook.py:3", ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and difference.deviating == (1,)
    output = "\n".join(diagnosis.explain_refused(FailureFiles(scenario.recordings), 2000.0))
    assert "rank 1 differs from the expected order" in output
    assert "rank 1: all_reduce gradients.0 [9] float32 of ranks 0-1, step 3, called at hook.py:3" in output


@pytest.mark.parametrize("odd", range(4))
def test_among_several_ranks_the_minority_deviates(odd: int) -> None:
    scenario, rest = Scenario(4), [rank for rank in range(4) if rank != odd]
    scenario.do("gradients.0", *rest, ended=False).do("gradients.7", odd, ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and difference.deviating == (odd,)


def test_of_two_ranks_without_history_both_are_named() -> None:
    scenario = Scenario(2).do("gradients.0", 0, ended=False).do("gradients.1", 1, ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and difference.deviating == (0, 1) and "not clear which" in scenario.explanation()


def test_a_first_evaluation_makes_no_rank_deviate() -> None:
    scenario = Scenario(2).steps(2).do("", 0, operation="gather_objects", shape="", ended=False)
    scenario.do("gradients.0", 1, step=3, ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and difference.deviating == (0, 1)


def test_wrapped_records_are_compared_where_they_overlap() -> None:
    scenario = Scenario(2).steps(20).do("gradients.0", 0, ended=False)
    recordings = scenario.recordings
    recordings[0], recordings[1] = (
        replace(recordings[0], entries=recordings[0].entries[50:]),
        replace(recordings[1], entries=recordings[1].entries[9:]),
    )
    difference = diagnosis.first_difference(recordings)
    assert difference is not None and difference.index == 80 and difference.deviating == (1,)
    recordings[1] = replace(recordings[1], entries=recordings[1].entries[-1:])
    assert diagnosis.first_difference({**recordings, 1: replace(recordings[1], entries=())}) is not None


def test_groups_are_compared_separately() -> None:
    scenario = Scenario(4).do("tensor.a", 0, 1, group="0-1").do("tensor.a", 2, 3, group="2-3")
    scenario.do("tensor.b", 2, group="2-3", ended=False).do("gradients.0", 0, group="0-2/2", ended=False)
    difference = diagnosis.first_difference(scenario.recordings)
    assert difference is not None and (difference.ranks, difference.deviating) == ("2-3", (3,))
    assert diagnosis.waiting(scenario.recordings)[0].rank == 2


def test_in_a_graph_the_first_collective_not_begun_is_named() -> None:
    scenario = Scenario(2).do("metrics", in_graph=True, ended=False).do("gradients.0", 0, in_graph=True, ended=False)
    wait = diagnosis.waiting(scenario.recordings)[0]
    assert (wait.rank, wait.entry.name, wait.absent) == (0, "gradients.0", (1,))
    assert "in a graph" in scenario.explanation()


def test_gathered_lengths_may_differ_between_ranks() -> None:
    scenario = (
        Scenario(2)
        .do("objects", 0, operation="all_gather", shape="[3,4]")
        .do("objects", 1, operation="all_gather", shape="[7,4]")
    )
    assert diagnosis.first_difference(scenario.recordings) is None
    scenario.do("objects", 0, operation="all_gather", shape="[3,4]").do(
        "objects", 1, operation="all_gather", shape="[3,5]"
    )
    assert diagnosis.first_difference(scenario.recordings) is not None


def test_ranks_with_unreadable_records_are_named() -> None:
    scenario = Scenario(4).do("gradients.0", 0, 1, ended=False)
    recordings = {rank: recording for rank, recording in scenario.recordings.items() if rank < 2}
    assert "The flight recorders of ranks 2-3 can't be read from here" in diagnosis.explain(
        FailureFiles(recordings), 2000.0
    )


# The watchdog


class FakeWorld:
    """A rank of a world that records the code of its abort."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.recorder = rank, size, make_recorder(folder, rank, size)
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.process = Process()
        self.process.rank, self.process.size = rank, size
        self.process.connect(self.recorder, self.abort)
        self.process.begin(TRAINING)

    def abort(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()
        raise SystemExit(code)


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "STARTUP_SECONDS", 0.0)
    for module, names in ((watchdog, "_STACK _TURN _ABORT"), (abort, "_ERROR _TURN _ABORT")):
        for name in names.split():
            monkeypatch.setattr(module, f"{name}_SECONDS", 0.4)


def start_watchdog(process: Process, timeout: float = 0.4) -> Watchdog:
    process.timeout = timeout
    watchdog = Watchdog(process, poll=0.05)
    watchdog.start()
    return watchdog


def output_of_a_hang(worlds: list[FakeWorld], watchers: list[Watchdog], capfd: pytest.CaptureFixture[str]) -> str:
    """Wait until the watchdogs have ended all ranks with one report; return what was printed."""
    assert all(world.ended.wait(10) for world in worlds)
    for watcher in watchers:
        watcher.stop()
    output = capfd.readouterr().err
    assert output.count("the run hangs") == 1 and [world.codes for world in worlds] == [[1], [1]]
    return output


def test_a_timed_out_collective_ends_the_run_with_a_diagnosis(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "flight_recorder"
    worlds = [FakeWorld(folder, rank, 2) for rank in (0, 1)]
    watchers = [start_watchdog(world.process) for world in worlds]
    worlds[0].process.step(3)
    begin_all_reduce(worlds[0].recorder, "gradients.0")
    output = output_of_a_hang(worlds, watchers, capfd)
    assert "in all_reduce gradients.0 [3,2] float32 of ranks 0-1, step 3, called at tests/test_watchdog.py:" in output
    assert "Not arrived there: rank 1." in output and "in test_a_timed_out_collective_ends_the_run" in output
    assert f"doctor --run {tmp_path / 'run'}" in output
    assert failure_files.ranks_with_stacks(folder) == {0, 1}


class InstalledDiagnosis:
    """An entry point of the group ``hvdlm.diagnosis``."""

    def __init__(self, loaded: object) -> None:
        self._loaded = loaded

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


@pytest.fixture
def diagnoses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that replaces what is installed for the diagnosis of hangs."""

    def install(*loaded: object) -> None:
        entries = [InstalledDiagnosis(each) for each in loaded]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if "diagnosis" in group else [])
        explanations.diagnosis.cache_clear()

    yield install
    explanations.diagnosis.cache_clear()


class RaisingDiagnosis:
    def explain_hang(self, folder: Path, now: float) -> str | None:
        raise ValueError("a bug of the diagnosis")

    explain_refused = explain_hang


@pytest.mark.parametrize("installed", [(), (ImportError("broken"),), (RaisingDiagnosis(),)])
def test_without_a_working_diagnosis_stacks_are_printed(
    installed: tuple[object, ...], diagnoses: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diagnoses(*installed)
    worlds = [FakeWorld(tmp_path, rank, 2) for rank in (0, 1)]
    watchers = [start_watchdog(world.process) for world in worlds]
    begin_all_reduce(worlds[0].recorder, "gradients.0")
    output = output_of_a_hang(worlds, watchers, capfd)
    assert "has been training" in output and "in test_without_a_working_diagnosis_stacks_are_printed" in output


@pytest.mark.parametrize("installed", [(), (RaisingDiagnosis(),)])
def test_an_error_is_reported_without_a_working_diagnosis(
    installed: tuple[object, ...], diagnoses: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diagnoses(*installed)
    abort.report(FakeWorld(tmp_path, 0, 2), RuntimeError("Horovod has been shut down"), is_cause=False)
    assert "hvdlm: rank 0 failed: RuntimeError: Horovod has been shut down" in capfd.readouterr().err


def test_a_rank_without_any_progress_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = FakeWorld(tmp_path)
    watcher = start_watchdog(world.process, 0.2)
    assert world.ended.wait(10) and world.codes == [1]
    watcher.stop()
    assert "No rank is in a collective." in capfd.readouterr().err


def test_the_next_rank_reports_where_rank_0_is_stuck(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_recorder(tmp_path, 0, 3)
    worlds = [FakeWorld(tmp_path, rank, 3) for rank in (1, 2)]
    watchers = [start_watchdog(world.process) for world in worlds]
    for world in worlds:
        begin_all_reduce(world.recorder, "gradients.0", (0, 1, 2))
    assert all(world.ended.wait(10) for world in worlds)
    for watcher in watchers:
        watcher.stop()
    output = capfd.readouterr().err
    assert output.count("the run hangs") == 1 and "Not arrived there: rank 0." in output
    assert "It left no stack" in output


def test_any_kind_of_progress_prevents_the_timeout(tmp_path: Path) -> None:
    kinds = ("step", "alive", "collectives")
    worlds = {kind: FakeWorld(tmp_path / kind) for kind in kinds}
    watchers = [start_watchdog(world.process, 0.3) for world in worlds.values()]
    for number in range(12):
        time.sleep(0.1)
        recorder = worlds["collectives"].recorder
        recorder.end(begin_all_reduce(recorder, "gradients.0"))
        worlds["step"].process.step(number)
        worlds["alive"].process.alive()
    for watcher in watchers:
        watcher.stop()
    time.sleep(0.7)
    for kind, world in worlds.items():
        assert not world.codes and not failure_files.has_marker(tmp_path / kind, failure_files.HANG), kind


def test_a_rank_that_is_reporting_an_error_is_not_hung(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path)
    watcher = start_watchdog(world.process, 0.1)
    world.recorder.failing = True
    time.sleep(0.5)
    watcher.stop()
    assert not world.codes


# Failures


class HorovodInternalError(RuntimeError):
    pass


class Exception_(RuntimeError):
    pass


Exception_.__name__, Exception_.__module__ = "Exception", "mpi4py.MPI"


GRAPH_ERROR = """Graph execution error:

Detected at node EagerPyFunc defined at (most recent call last):
  File "/x/hvdlm_backends/horovod.py", line 38, in _start

ValueError: the lamp is out
Traceback (most recent call last):

  File "/x/tensorflow/python/ops/script_ops.py", line 267, in __call__
    return func(device, token, args)

ValueError: the lamp is out


\t [[{{node EagerPyFunc}}]]
\t [[HorovodAllreduce/_2]] [Op:__inference__step_2483]"""


def test_graph_errors_are_reduced_to_their_cause() -> None:
    assert failure_files.short_message(tensorflow_error(GRAPH_ERROR)) == "ValueError: the lamp is out"
    several = (
        "Graph execution error:\n\n2 root error(s) found.\n  (0) UNKNOWN: Horovod has been shut down\n\t [[{{node a}}]]"
    )
    assert abort.is_transport_error(tensorflow_error(several))


def tensorflow_error(message: str) -> Exception:
    kind = type("UnknownError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})
    return kind(message)


@pytest.mark.parametrize(
    "error, expected",
    [
        (HorovodInternalError("Connection closed by peer"), True),
        (Exception_("MPI_ERR_OTHER"), True),
        (RuntimeError("Horovod has been shut down. This was caused by an exception on one of the ranks"), True),
        (tensorflow_error("Graph execution error:\n\nHorovod has been shut down"), True),
        (
            tensorflow_error("{{function_node __wrapped}} Mismatched allreduce tensor shapes: [Op:HorovodAllreduce]"),
            True,
        ),
        (
            tensorflow_error("ValueError: the lamp is out\n\t [[{{node EagerPyFunc}}]]\n\t [[HorovodAllreduce/_2]]"),
            False,
        ),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("about Horovod"), False),
        (RankError("the loss of step 3 is not a number"), False),
    ],
)
def test_transport_errors_are_recognised(error: Exception, expected: bool) -> None:
    assert abort.is_transport_error(error) == expected


def test_simultaneous_failures_are_reported_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worlds = [FakeWorld(tmp_path, rank, 2) for rank in (0, 1)]
    for world in worlds:
        with pytest.raises(SystemExit):
            abort.end(world, RankError("the loss of step 3 is not a number"))
    assert capfd.readouterr().err.count("the loss of step 3") == 1
    assert [world.codes for world in worlds] == [[1], [1]] and set(failure_files.read_failures(tmp_path)) == {0, 1}


def test_a_transport_error_is_left_to_the_failing_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = FakeWorld(tmp_path, 0, 2)
    later = Failure(1, "ValueError: the lamp is out", 3, time.time())
    threading.Timer(0.2, failure_files.write_failure, (tmp_path, later)).start()
    with pytest.raises(SystemExit):
        abort.end(world, HorovodInternalError("Connection closed by peer"))
    assert capfd.readouterr().err == "" and world.codes == [1]


def test_rank_0_explains_mismatched_collectives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worlds = [FakeWorld(tmp_path, rank, 2) for rank in (0, 1)]
    for world in worlds:
        for name in ("gradients.0", "metrics", "gradients.0", "metrics"):
            world.recorder.end(begin_all_reduce(world.recorder, name))
        begin_all_reduce(world.recorder, "gradients.0", size=3 + world.rank)
    threads = [
        threading.Thread(target=abort.end, args=(w, HorovodInternalError("Mismatched allreduce tensor shapes")))
        for w in worlds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    output = capfd.readouterr().err
    assert output.count("Mismatched allreduce") == 1 and "hvdlm: rank 0 failed: HorovodInternalError" in output
    assert (
        "rank 1 differs from the expected order" in output and "rank 1: all_reduce gradients.0 [4,2] float32" in output
    )


def test_without_a_folder_every_rank_reports_its_error(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    world = FakeWorld(tmp_path, 1, 2)
    world.recorder.folder = None
    with pytest.raises(SystemExit):
        abort.end(world, HorovodInternalError("Connection closed by peer"))
    assert "rank 1 failed: HorovodInternalError: Connection closed by peer" in capfd.readouterr().err


def test_damaged_failure_files_are_ignored(tmp_path: Path) -> None:
    for number, text in enumerate(["", "[]", '{"message": 1}', "[" * 100000, '{"message": "x", "step": "y"}', "\0"]):
        (tmp_path / f"failed-{number:04d}.json").write_text(text)
    (tmp_path / "failed-0009.json").symlink_to("/dev/zero")
    assert failure_files.read_failures(tmp_path) == {}
