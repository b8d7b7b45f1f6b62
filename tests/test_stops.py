"""Runs that are asked to stop save, end with the documented exit code, and go on exactly where they were."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.config import Config, DataConfig
from hvdlm.errors import STOPPED, HvdlmError
from hvdlm.tasks.language_model import LanguageModel
from hvdlm.training.consensus import Consensus, Votes
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.signals import Signals
from hvdlm_backends.local import LocalWorld
from launching import SMALL, STEPS, launch, losses

OPTIONS = [*SMALL, *STEPS, "--checkpoint.every", "20"]


def disturb(folder: Path, framework: str, ranks: int, *parsing: str, **what: object):
    """Run with something done to it (see disturbed.py) in ``folder``."""
    command = ["tests/disturbed.py", "--framework", framework, "--log.run", str(folder), *OPTIONS, *parsing]
    return launch("mpirun", ranks, command, HVDLM_TEST_DISTURB=json.dumps(what))


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("framework, first", [("torch", "SIGTERM"), ("tensorflow", "SIGUSR1")])
def test_a_signal_to_any_rank_stops_all_which_go_on_bit_for_bit(
    curve: Callable[..., Path], tmp_path: Path, framework: str, first: str
) -> None:
    run = tmp_path / "run"
    stopped = disturb(run, framework, 2, signals=[[1, 7, first]])
    assert stopped.returncode == STOPPED, stopped.stderr[-3000:]
    assert f"rank 1: {first}: the run saves after this step and stops" in stopped.stderr
    assert status(run)["state"] == "stopped" and 7 <= status(run)["step"] <= 9 and status(run)["code"] == STOPPED
    if framework == "torch":  # once more, by a signal to the other rank
        again = disturb(run, framework, 2, "--checkpoint.resume", "auto", signals=[[0, 15, "SIGINT"]])
        assert again.returncode == STOPPED and status(run)["step"] >= 15, again.stderr[-3000:]
    done = disturb(run, framework, 2, "--checkpoint.resume", "auto")
    assert done.returncode == 0 and status(run)["state"] == "done", done.stderr[-3000:]
    assert losses(run) == losses(curve(framework, 2, *STEPS))
    assert not list(run.rglob(".*")) and not (run / "flight_recorder").exists()


def test_a_second_signal_stops_at_once_and_a_time_limit_saves(tmp_path: Path) -> None:
    twice = {"signals": [[0, 5, "SIGINT"], [0, 5, "SIGINT"]], "late": [0, 5, "SIGINT", 1.2], "sleep": [0, 5, 60]}
    done = disturb(tmp_path / "a", "torch", 1, "--train.steps", "100000", **twice)
    assert (
        done.returncode == 130 and done.stderr.count("SIGINT") == 2 and "SIGINT: again: stopped at once" in done.stderr
    )
    done = disturb(tmp_path / "b", "torch", 1, "--train.steps", "100000", "--train.max_seconds", "1.5")
    assert done.returncode == STOPPED and status(tmp_path / "b")["reason"] == "train.max_seconds", done.stderr
    assert list((tmp_path / "b" / "checkpoints").glob("step-*")) and "stopped after step" in done.stdout


EARLY = """
import os, signal, sys
from hvdlm import cli
from hvdlm.configuration import parsing

parse = options.parse_config

def parse_config(*arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    return parse(*arguments)

options.parse_config = parse_config
code = cli.main()
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
sys.exit(code)
"""


def test_a_signal_counts_from_the_first_moment_and_none_kills_a_run_that_ends(tmp_path: Path) -> None:
    """While options are read; and when an interpreter that ends gives its handlers up."""
    run = tmp_path / "run"
    done = launch("", 1, ["-c", EARLY, "--log.run", str(run), *SMALL, *STEPS])
    assert done.returncode == STOPPED and "SIGUSR1: the run saves after this step and stops" in done.stderr, done.stderr
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 0)


def read_rows(path: Path, ranks: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return (row, [(first, last, CRC-32) of every rank]) of every step."""
    each = [[json.loads(line) for line in Path(f"{path}.{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [(step[0][0], [tuple(own[1:]) for own in step]) for step in zip(*each, strict=True)]


FULL = os.environ.get("HVDLM_CHAOS") == "1"
# Every change among 1, 2 and 4 ranks once, each also to itself; or, outside of make chaos, up and down.
CHAIN = [1, 1, 2, 2, 4, 4, 1, 4, 2, 1] if FULL else [2, 4, 1]


def test_samples_go_on_exactly_on_any_number_of_ranks(tmp_path: Path) -> None:
    seen: list[int] = []
    for number, ranks in enumerate(CHAIN):
        last = number == len(CHAIN) - 1
        limit = [] if last else [[ranks - 1, 3 * number + 2, "SIGUSR1"]]
        resume = ["--checkpoint.resume", "auto"] if number else []
        path = tmp_path / f"rows{number}"
        done = disturb(tmp_path / "run", "torch", ranks, *resume, rows=str(path), signals=limit)
        assert done.returncode == (0 if last else STOPPED), done.stderr[-3000:]
        for row, parts in read_rows(path, ranks):
            seen.append(row)
            edges = [edge for first, end, _ in parts for edge in (first, end)]
            assert edges[0] == 0 and edges[-1] == 8 and edges[1:-1:2] == edges[2:-1:2]
    assert seen == [8 * step for step in range(30)]


class Text:
    """The task on a text of its own, made once for every size."""

    known: dict[tuple, LanguageModel] = {}

    @classmethod
    def task(cls, folder: Path, seed: int, batch: int, context: int, sampling: str) -> LanguageModel:
        key = (seed, batch, context, sampling)
        if key not in cls.known:
            text = folder / "text.txt"
            text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(6000)))
            config = Config(data=DataConfig(path=str(text), context=context, sampling=sampling, cache=str(folder)))  # type: ignore[arg-type]
            config.train.seed, config.train.batch_size = seed, batch
            cls.known[key] = LanguageModel(config)
        return cls.known[key]


def consumed(task: LanguageModel, cursor: DataCursor, batch: int, steps: int, ranks: int) -> list[bytes]:
    """Return what ``steps`` steps on ``ranks`` ranks read, sequence by sequence."""
    found = []
    for _ in range(steps):
        number, before = cursor.place(cursor.advance())
        for rank in range(ranks):
            first, last = before + rank * batch // ranks, before + (rank + 1) * batch // ranks
            found += [row.tobytes() for row in task.batch(number, first, last).inputs]
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    per_rank=st.integers(1, 4),
    stops=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4])), min_size=1, max_size=5),
    sampling=st.sampled_from(["shuffled", "sequential"]),
)
def test_what_is_read_is_the_same_wherever_a_run_stops(
    tmp_path_factory: pytest.TempPathFactory, seed: int, per_rank: int, stops: list[tuple[int, int]], sampling: str
) -> None:
    batch = 4 * per_rank
    folder = Path(tmp_path_factory.getbasetemp()) / "text"
    folder.mkdir(exist_ok=True)
    task = Text.task(folder, seed, batch, 8, sampling)
    whole = consumed(task, DataCursor(batch), batch, sum(steps for steps, _ in stops), 1)
    found, manifest = [], {"cursor": DataCursor(batch).to_json()}
    for steps, ranks in stops:
        cursor = DataCursor.of(json.loads(json.dumps(manifest)), batch)
        found += consumed(task, cursor, batch, steps, ranks)
        manifest = {"cursor": cursor.to_json()}
    assert found == whole


def test_another_batch_size_goes_on_with_the_next_sequence(tmp_path: Path) -> None:
    small, large = (Text.task(tmp_path, 3, batch, 8, "shuffled") for batch in (4, 6))
    first, cursor = consumed(small, before := DataCursor(4), 4, 5, 1), DataCursor.of({"cursor": before.to_json()}, 6)
    assert first + consumed(large, cursor, 6, 5, 2) == consumed(small, DataCursor(4), 4, 13, 1)[:50]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), max_size=6), st.integers(1, 25))
def test_rows_that_are_left_out_are_never_read_and_no_others_lost(batch: int, bad: list[int], steps: int) -> None:
    cursor = DataCursor(batch)
    cursor.leave_out([batch * number for number in bad])
    read = [cursor.advance() for _ in range(steps)]
    expected = (batch * n for n in itertools.count() if n not in bad)
    assert read == list(itertools.islice(expected, steps))
    assert DataCursor.of({"cursor": cursor.to_json()}, batch).advance() == next(expected)


@pytest.mark.parametrize(
    "cursor", [{}, [], {"rows": -1, "left_out": []}, {"rows": 1.5, "left_out": []}, {"rows": 0, "left_out": [[1]]}]
)
def test_a_damaged_cursor_is_refused(cursor: object) -> None:
    with pytest.raises(HvdlmError, match="data cursor is damaged"):
        DataCursor.of({"cursor": cursor}, 8)


def test_ranks_hear_at_the_end_of_a_step_what_was_told_in_the_one_before() -> None:
    signals = Signals(0)
    consensus = Consensus(LocalWorld(), None, signals)
    assert consensus.result() == Votes() and consensus.stopped_before() is None
    consensus.vote(row=8, ready=True, skipped=False)
    signals._caught(signal.SIGTERM)
    assert consensus.result() == Votes(8, 0, 0, 1, 0) and consensus.result().row is None
    consensus.vote(row=16, ready=False, skipped=True)
    heard = consensus.result()
    assert heard == Votes(16, 1, 0, 0, 1) and heard.stop_reason == "signal" and consensus.stopped_before() == "signal"
    late = Consensus(LocalWorld(), 1e-9, SimpleNamespace(asked=False, abort=None))  # type: ignore[arg-type]
    late.tell(0, False, False)
    assert late.hear().reason == "train.max_seconds"
