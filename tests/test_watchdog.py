"""Ledgers are whole whatever happens, what is read is checked, and hangs and failures are told rightly, and once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm.diagnostics import abort, diagnosis, failure_files, watchdog
from hvdlm.diagnostics.failure_files import Failure, Scene
from hvdlm.diagnostics.flight_recorder import RECORDS, FlightRecorder, clean, ranks_in, ranks_text
from hvdlm.diagnostics.recorder_reader import Entry, LedgerView, read_recorder
from hvdlm.diagnostics.watchdog import Watchdog
from hvdlm.errors import HvdlmError, RankError

# A rank's abort does not return: here, it ends the thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

# Ledgers


def kept(folder: Path, rank: int = 0, size: int = 2) -> FlightRecorder:
    found = FlightRecorder(rank, size)
    found.keep_in(folder, rank)
    return found


def handed_over(book: FlightRecorder, name: str, ranks: tuple[int, ...] = (0, 1), size: int = 3) -> int:
    """Begin an all-reduce, on behalf of the caller, as a backend does."""
    return book.begin("all_reduce", name, book.members(ranks), [np.zeros((size, 2), np.float32)])


def test_what_is_begun_and_ended_is_read_back(tmp_path: Path) -> None:
    book = FlightRecorder(1, 2)
    book.end(handed_over(book, "gradients.0"))  # in memory, before the folder is known
    book.keep_in(tmp_path / "flight_recorder", 1)
    book.step(7)
    handed_over(book, "gradients.1", (0, 1, 2, 3), 5)
    view = read_recorder(tmp_path / "flight_recorder" / "rank-0001.recorder")
    assert (view.rank, view.size, view.pid, view.step) == (1, 2, os.getpid(), 7)
    first, second = view.entries
    assert (first.sequence, first.place, first.step, first.name, first.ranks) == (1, 0, 0, "gradients.0", "0-1")
    assert 0 < first.begun <= first.ended <= time.time()
    assert (second.sequence, second.place, second.step, second.ended) == (2, 0, 7, 0.0)
    assert (second.operation, second.shape, second.dtype, second.ranks) == ("all_reduce", "[5,2]", "float32", "0-3")
    assert second.site.startswith("tests/test_watchdog.py:"), second.site


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (3, 7), (0, 2, 4, 6), (5, 3), (0, 1, 4), tuple(range(512))])
def test_ranks_become_text_and_come_back(ranks: tuple[int, ...]) -> None:
    assert tuple(ranks_in(ranks_text(ranks))) == ranks


def test_a_full_ring_keeps_the_newest(tmp_path: Path) -> None:
    book = kept(tmp_path)
    for number in range(RECORDS + 10):
        book.end(handed_over(book, f"n{number}"))
    entries = read_recorder(tmp_path / "rank-0000.recorder").entries
    assert [entry.sequence for entry in entries] == list(range(11, RECORDS + 11))
    assert entries[0].name == "n10" and all(entry.ended for entry in entries)


def test_a_handle_that_ends_after_its_record_was_overwritten_spoils_nothing(tmp_path: Path) -> None:
    book = kept(tmp_path)
    late = handed_over(book, "late")
    for number in range(RECORDS):
        handed_over(book, f"n{number}")
    book.end(late)
    assert all(not entry.ended for entry in read_recorder(tmp_path / "rank-0000.recorder").entries)


def test_a_graphs_collectives_are_written_at_every_run(tmp_path: Path) -> None:
    book = kept(tmp_path)
    with book.graph(()) as calls:
        assert [handed_over(book, "a"), handed_over(book, "b")] == [0, 0]
        assert not book.open  # a graph may take its time
    with book.graph(calls) as again:
        entries = read_recorder(tmp_path / "rank-0000.recorder").entries
        assert [(e.name, bool(e.ended), e.in_graph) for e in entries[2:]] == [("a", False, True), ("b", False, True)]
    entries = read_recorder(tmp_path / "rank-0000.recorder").entries
    assert again == [] and [entry.place for entry in entries] == [0, 1, 2, 3] and all(e.ended for e in entries)


def test_a_killed_process_leaves_its_ledger(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from hvdlm.diagnostics.flight_recorder import Ledger\n"
        "book = Ledger(0, 2); book.keep_in(Path(sys.argv[1]), 0)\n"
        "book.begin('all_reduce', 'last', book.members((0, 1))); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [entry.name for entry in read_recorder(tmp_path / "rank-0000.recorder").entries] == ["last"]


def damaged(folder: Path, how: str) -> Path:
    book, path = kept(folder), folder / "rank-0000.recorder"
    book.end(handed_over(book, "gradients.0"))
    book.flush()
    whole, other = path.read_bytes(), folder / "other"
    if how == "missing":
        return other
    if how == "link":
        other.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(other)
    elif how == "folder":
        other.mkdir()
    elif how == "huge":
        other.touch()
        os.truncate(other, 1 << 40)
    else:
        cuts = {"empty": b"", "short": whole[:300], "cut": whole[:-1], "foreign": b"\x89PNG" + whole[4:]}
        counts = {
            "many records": whole[:12] + b"\xff\xff\xff\xff" + whole[16:],
            "rank": whole[:16] + b"\2" + whole[17:],
        }
        other.write_bytes({**cuts, **counts}[how])
    return other


HOW = ["missing", "link", "pipe", "folder", "huge", "empty", "short", "cut", "foreign", "many records", "rank"]


@pytest.mark.parametrize("how", HOW)
def test_what_is_no_ledger_is_named(how: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, how)
    with pytest.raises(HvdlmError, match=r"other: .*"):
        read_recorder(path)


def test_flipped_bytes_are_read_or_refused_and_what_is_said_is_printable(tmp_path: Path) -> None:
    book, path = kept(tmp_path), tmp_path / "rank-0000.recorder"
    for number in range(40):
        book.end(handed_over(book, f"n{number}"))
    book.flush()
    whole, random = path.read_bytes()[: 256 * 41], np.random.default_rng(1)
    short = bytearray(whole)
    short[12:16] = (40).to_bytes(4, "little")  # a ledger of 40 records
    for _ in range(300):
        bad = bytearray(short)
        for place in random.integers(0, len(bad), 20):
            bad[place] = random.integers(0, 256)
        path.write_bytes(bad)
        scene = failure_files.read_scene(tmp_path)
        if scene.views:
            assert all(c.isprintable() or c == "\n" for c in diagnosis.report(scene))
        else:
            assert len(scene.unreadable) == 1


def test_where_nothing_can_be_written_the_ledger_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    book = kept(tmp_path / "flight_recorder")
    book.end(handed_over(book, "gradients.0"))
    book.step(3)
    book.flush()
    assert book.folder is None


def test_after_an_orderly_end_nothing_is_left_but_what_is_the_users(tmp_path: Path) -> None:
    books = [kept(tmp_path / "flight_recorder", rank) for rank in (0, 1)]
    books[0].discard()
    assert sorted(p.name for p in (tmp_path / "flight_recorder").iterdir()) == ["rank-0001.recorder"]
    books[1].discard()
    assert not (tmp_path / "flight_recorder").exists()
    kept(tmp_path / "flight_recorder")
    (tmp_path / "flight_recorder" / "hang.json").touch()
    (tmp_path / "flight_recorder" / "notes").touch()
    clean(tmp_path / "flight_recorder")
    assert [p.name for p in (tmp_path / "flight_recorder").iterdir()] == ["notes"]


def test_an_entry_costs_microseconds(tmp_path: Path) -> None:
    book, members, tensor = kept(tmp_path), None, np.zeros((64, 64), np.float32)
    members = book.members((0, 1))

    def cost() -> float:
        began = time.perf_counter()
        for _ in range(2000):
            book.end(book.begin("all_reduce", "gradients.3", members, (tensor,)))
        return (time.perf_counter() - began) / 2000

    assert min(cost() for _ in range(5)) < 40e-6  # 4 to 8 on an idle core


# Diagnoses


class Story:
    """Made-up ledgers: every rank does what is told of it, a second apart."""

    def __init__(self, size: int) -> None:
        self.size, self.clock = size, itertools.count(1000)
        self.entries: dict[int, list[Entry]] = {rank: [] for rank in range(size)}

    def do(self, name: str, *ranks: int, group: str = "", ended: bool = True, **more: Any) -> Story:
        """Have ``ranks`` (none: all) do an all-reduce."""
        for rank in ranks or range(self.size):
            before, now = self.entries[rank], float(next(self.clock))
            text = group or f"0-{self.size - 1}"
            place = sum(entry.ranks == text for entry in before)
            operation, step = more.get("operation", "all_reduce"), more.get("step", 0)
            known = (len(before) + 1, place, step, now, now if ended else 0.0, operation, name, text)
            entry = Entry(*known, more.get("shape", "[8]"), "float32", more.get("site", "model.py:1"))
            before.append(replace(entry, in_graph=more.get("in_graph", False)))
        return self

    def steps(self, count: int) -> Story:
        for step in range(1, count + 1):
            for name in ("gradients.0", "gradients.1", "gradients.2", "metrics"):
                self.do(name, step=step)
        return self

    @property
    def views(self) -> dict[int, LedgerView]:
        last = {rank: entries[-1].step if entries else 0 for rank, entries in self.entries.items()}
        return {
            rank: LedgerView(rank, self.size, 100 + rank, "host", last[rank], 2000.0, tuple(entries))
            for rank, entries in self.entries.items()
        }

    def told(self, stacks: dict[int, str] | None = None) -> str:
        return diagnosis.explain(Scene(self.views, stacks or {}), float(next(self.clock)))


def test_a_rank_that_sleeps_has_not_arrived_and_its_place_is_shown() -> None:
    story = Story(2).steps(3).do("gradients.0", 0, ended=False, step=4, site="gradients.py:44")
    stack = 'MainThread, the innermost call last:\n  File "hook.py", line 5, in nap\n    time.sleep(1)\n\nother, ...\n'
    told = story.told({1: stack})
    assert "rank 0 waits for 1 s in all_reduce gradients.0 [8] float32 of ranks 0-1, step 4, called at gradients.py:44"
    assert "Not arrived there: rank 1." in told and "rank 1 differs from the rule" in told
    assert "Rank 1 (step 3, process 101 on host): its last collective, ended" in told
    assert 'File "hook.py", line 5, in nap' in told and "other" not in told


def test_a_rank_that_skips_is_the_one_unlike_its_own_steps_before() -> None:
    story = (
        Story(2).steps(3).do("gradients.0", step=4).do("gradients.1", 0, step=4, site="gradients.py:44", ended=False)
    )
    story.do("gradients.2", step=4, site="gradients.py:45").do("metrics", step=4)
    story.do("gradients.0", 1, step=5, ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and (difference.place, difference.deviating) == (13, (1,))
    told = story.told()
    assert "rank 0 waits" in told and "in all_reduce gradients.1 [8] float32 of ranks 0-1, step 4" in told
    assert "Not arrived there: rank 1." in told
    assert "rank 1: all_reduce gradients.2 [8] float32 of ranks 0-1, step 4, called at gradients.py:45" in told


def test_a_rank_with_another_shape_is_the_one_that_never_had_it() -> None:
    story = Story(2).steps(2).do("gradients.0", 0, step=3, ended=False)
    story.do("gradients.0", 1, step=3, shape="[9]", site="hook.py:3", ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and difference.deviating == (1,)
    told = "\n".join(diagnosis.refused(Scene(story.views), 2000.0))
    assert "rank 1 differs from the rule" in told
    assert "rank 1: all_reduce gradients.0 [9] float32 of ranks 0-1, step 3, called at hook.py:3" in told


@pytest.mark.parametrize("odd", range(4))
def test_of_several_ranks_the_minority_is_asked(odd: int) -> None:
    story, rest = Story(4), [rank for rank in range(4) if rank != odd]
    story.do("gradients.0", *rest, ended=False).do("gradients.7", odd, ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and difference.deviating == (odd,)


def test_of_two_ranks_without_a_past_both_are_named() -> None:
    story = Story(2).do("gradients.0", 0, ended=False).do("gradients.1", 1, ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and difference.deviating == (0, 1) and "can't be told" in story.told()


def test_the_first_evaluation_is_not_held_against_the_rank_that_does_it() -> None:
    story = Story(2).steps(2).do("", 0, operation="gather_objects", shape="", ended=False)
    story.do("gradients.0", 1, step=3, ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and difference.deviating == (0, 1)


def test_ledgers_that_wrapped_around_are_compared_where_both_still_have_entries() -> None:
    story = Story(2).steps(20).do("gradients.0", 0, ended=False)
    views = story.views
    views[0], views[1] = (
        replace(views[0], entries=views[0].entries[50:]),
        replace(views[1], entries=views[1].entries[9:]),
    )
    difference = diagnosis.first_difference(views)
    assert difference is not None and difference.place == 80 and difference.deviating == (1,)
    views[1] = replace(views[1], entries=views[1].entries[-1:])
    assert diagnosis.first_difference({**views, 1: replace(views[1], entries=())}) is not None


def test_groups_are_compared_by_themselves() -> None:
    story = Story(4).do("tensor.a", 0, 1, group="0-1").do("tensor.a", 2, 3, group="2-3")
    story.do("tensor.b", 2, group="2-3", ended=False).do("gradients.0", 0, group="0-2/2", ended=False)
    difference = diagnosis.first_difference(story.views)
    assert difference is not None and (difference.ranks, difference.deviating) == ("2-3", (3,))
    assert diagnosis.waiting(story.views)[0][0] == 2


def test_in_a_graph_the_first_that_somebody_has_not_begun_is_told() -> None:
    story = Story(2)
    for name in ("metrics", "gradients.0", "gradients.1"):
        story.do(name, in_graph=True, ended=False) if name != "gradients.0" else story.do(name, 0, in_graph=True)
    story = Story(2).do("metrics", in_graph=True, ended=False).do("gradients.0", 0, in_graph=True, ended=False)
    rank, entry, absent = diagnosis.waiting(story.views)[0]
    assert (rank, entry.name, absent) == (0, "gradients.0", (1,)) and "in a graph" in story.told()


def test_lengths_that_ranks_gather_may_differ() -> None:
    story = (
        Story(2)
        .do("objects", 0, operation="all_gather", shape="[3,4]")
        .do("objects", 1, operation="all_gather", shape="[7,4]")
    )
    assert diagnosis.first_difference(story.views) is None
    story.do("objects", 0, operation="all_gather", shape="[3,4]").do(
        "objects", 1, operation="all_gather", shape="[3,5]"
    )
    assert diagnosis.first_difference(story.views) is not None


def test_ranks_whose_ledgers_cannot_be_seen_are_named() -> None:
    story = Story(4).do("gradients.0", 0, 1, ended=False)
    views = {rank: view for rank, view in story.views.items() if rank < 2}
    assert "The ledgers of ranks 2-3 can't be seen from here" in diagnosis.explain(Scene(views), 2000.0)


# The sentinel


class FakeWorld:
    """A rank of a world whose end is only noted."""

    def __init__(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.recorder = rank, size, kept(folder, rank, size)
        self.codes: list[int] = []
        self.ended = threading.Event()

    def abort(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()
        raise SystemExit(code)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_FIRST_SECONDS", 0.0)
    for module, names in ((watchdog, "_ANSWER _TURN _LEAVE"), (abort, "_WORD _TURN _LEAVE")):
        for name in names.split():
            monkeypatch.setattr(module, f"{name}_SECONDS", 0.4)


def watched(world: FakeWorld, folder: Path, timeout: float = 0.4) -> Watchdog:
    found = Watchdog(world, folder, timeout, poll=0.05)  # type: ignore[arg-type]
    found.start()
    return found


def test_a_collective_that_takes_too_long_ends_the_run_with_a_diagnosis(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "flight_recorder"
    worlds = [FakeWorld(folder, rank, 2) for rank in (0, 1)]
    watchers = [watched(world, folder) for world in worlds]
    watchers[0].step(3)
    handed_over(worlds[0].recorder, "gradients.0")
    assert all(world.ended.wait(10) for world in worlds)
    for watcher in watchers:
        watcher.stop()
    told = capfd.readouterr().err
    assert told.count("the run hangs") == 1 and [world.codes for world in worlds] == [[1], [1]]
    assert "in all_reduce gradients.0 [3,2] float32 of ranks 0-1, step 3, called at tests/test_watchdog.py:" in told
    assert "Not arrived there: rank 1." in told and "in test_a_collective_that_takes_too_long" in told
    assert f"doctor --run {tmp_path / 'run'}" in told
    assert failure_files.stacked(folder) == {0, 1}


def test_a_rank_that_does_nothing_at_all_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = FakeWorld(tmp_path)
    watcher = watched(world, tmp_path, 0.2)
    assert world.ended.wait(10) and world.codes == [1]
    watcher.stop()
    assert "No rank is in a collective." in capfd.readouterr().err


def test_where_rank_0_is_deaf_the_next_one_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept(tmp_path, 0, 3)
    worlds = [FakeWorld(tmp_path, rank, 3) for rank in (1, 2)]
    watchers = [watched(world, tmp_path) for world in worlds]
    for world in worlds:
        handed_over(world.recorder, "gradients.0", (0, 1, 2))
    assert all(world.ended.wait(10) for world in worlds)
    for watcher in watchers:
        watcher.stop()
    told = capfd.readouterr().err
    assert told.count("the run hangs") == 1 and "Not arrived there: rank 0." in told
    assert "It left no stack" in told


@pytest.mark.parametrize("kind", ["step", "alive", "collectives"])
def test_progress_of_any_kind_is_no_hang(kind: str, tmp_path: Path) -> None:
    world = FakeWorld(tmp_path)
    watcher = watched(world, tmp_path, 0.3)
    for number in range(12):
        time.sleep(0.1)
        if kind == "collectives":
            world.recorder.end(handed_over(world.recorder, "gradients.0"))
        else:
            watcher.step(number) if kind == "step" else watcher.alive()
    watcher.stop()
    assert not world.codes and not failure_files.marked(tmp_path, "hang")
    time.sleep(0.7)
    assert not world.codes


def test_a_rank_with_an_error_to_tell_is_not_taken_for_hung(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path)
    watcher = watched(world, tmp_path, 0.1)
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


def test_of_a_graphs_error_only_the_gist_is_told() -> None:
    assert failure_files.gist(tensorflow_error(GRAPH_ERROR)) == "ValueError: the lamp is out"
    several = (
        "Graph execution error:\n\n2 root error(s) found.\n  (0) UNKNOWN: Horovod has been shut down\n\t [[{{node a}}]]"
    )
    assert abort.of_transport(tensorflow_error(several))


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
def test_whose_error_it_is_is_told_apart(error: Exception, expected: bool) -> None:
    assert abort.of_transport(error) == expected


def test_two_ranks_that_fail_at_once_tell_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worlds = [FakeWorld(tmp_path, rank, 2) for rank in (0, 1)]
    for world in worlds:
        with pytest.raises(SystemExit):
            abort.end(world, RankError("the loss of step 3 is not a number"))
    assert capfd.readouterr().err.count("the loss of step 3") == 1
    assert [world.codes for world in worlds] == [[1], [1]] and set(failure_files.read_failures(tmp_path)) == {0, 1}


def test_a_rank_that_the_transport_ends_leaves_the_word_to_the_one_that_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    world = FakeWorld(tmp_path, 0, 2)
    later = Failure(1, "ValueError: the lamp is out", 3, time.time())
    threading.Timer(0.2, failure_files.write_failure, (tmp_path, later)).start()
    with pytest.raises(SystemExit):
        abort.end(world, HorovodInternalError("Connection closed by peer"))
    assert capfd.readouterr().err == "" and world.codes == [1]


def test_what_the_transport_refuses_is_told_by_rank_0_from_the_ledgers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worlds = [FakeWorld(tmp_path, rank, 2) for rank in (0, 1)]
    for world in worlds:
        for name in ("gradients.0", "metrics", "gradients.0", "metrics"):
            world.recorder.end(handed_over(world.recorder, name))
        handed_over(world.recorder, "gradients.0", size=3 + world.rank)
    threads = [
        threading.Thread(target=abort.end, args=(w, HorovodInternalError("Mismatched allreduce tensor shapes")))
        for w in worlds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = capfd.readouterr().err
    assert told.count("Mismatched allreduce") == 1 and "hvdlm: rank 0 failed: HorovodInternalError" in told
    assert "rank 1 differs from the rule" in told and "rank 1: all_reduce gradients.0 [4,2] float32" in told


def test_without_a_folder_everybody_tells_its_own(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    world = FakeWorld(tmp_path, 1, 2)
    world.recorder.folder = None
    with pytest.raises(SystemExit):
        abort.end(world, HorovodInternalError("Connection closed by peer"))
    assert "rank 1 failed: HorovodInternalError: Connection closed by peer" in capfd.readouterr().err


def test_words_that_are_damaged_are_no_words(tmp_path: Path) -> None:
    for number, text in enumerate(["", "[]", '{"message": 1}', "[" * 100000, '{"message": "x", "step": "y"}', "\0"]):
        (tmp_path / f"failed-{number:04d}.json").write_text(text)
    (tmp_path / "failed-0009.json").symlink_to("/dev/zero")
    assert failure_files.read_failures(tmp_path) == {}
