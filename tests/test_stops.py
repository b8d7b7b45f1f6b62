"""Signals and time limits make runs save and end with the documented exit code; they resume exactly."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.config import Config, DataConfig
from hvdlm.errors import STOPPED, HvdlmError
from hvdlm.training.batches import Batches
from hvdlm.training.consensus import Consensus, Votes
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run_control import RunControl
from hvdlm.training.signals import Signals
from hvdlm_backends.local import LocalWorld
from hvdlm_language.language_model import LanguageModel
from launching import ONE_LAYER, SMALL, STEPS, losses, read_rows, run_python, run_with_faults


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("framework, first", [("torch", "SIGTERM"), ("tensorflow", "SIGUSR1")])
def test_a_signal_to_any_rank_stops_all_and_resumes_exactly(
    curve: Callable[..., Path], tmp_path: Path, framework: str, first: str
) -> None:
    run = tmp_path / "run"
    stopped = run_with_faults(run, framework, 2, *ONE_LAYER, signals=[[1, 7, first]])
    assert stopped.returncode == STOPPED, stopped.stderr[-3000:]
    assert f"rank 1: {first}: the run saves after this step and stops" in stopped.stderr
    assert status(run)["state"] == "stopped" and 7 <= status(run)["step"] <= 9 and status(run)["code"] == STOPPED
    if framework == "torch":  # again, by a signal to the other rank
        resume = [*ONE_LAYER, "--checkpoint.resume", "auto"]
        stopped_again = run_with_faults(run, framework, 2, *resume, signals=[[0, 15, "SIGHUP"]])
        assert stopped_again.returncode == STOPPED and status(run)["step"] >= 15, stopped_again.stderr[-3000:]
    done = run_with_faults(run, framework, 2, *ONE_LAYER, "--checkpoint.resume", "auto")
    assert done.returncode == 0 and status(run)["state"] == "done", done.stderr[-3000:]
    assert losses(run) == losses(curve(framework, 2, *STEPS, *ONE_LAYER))
    assert not list(run.rglob(".*")) and not (run / "flight_recorder").exists()


def test_a_second_signal_stops_at_once_and_a_time_limit_saves(tmp_path: Path) -> None:
    twice = {"signals": [[0, 5, "SIGINT"], [0, 5, "SIGINT"]], "late": [0, 5, "SIGINT", 1.2], "sleep": [0, 5, 60]}
    done = run_with_faults(tmp_path / "a", "torch", 1, "--train.steps", "100000", **twice)
    assert (
        done.returncode == 130 and done.stderr.count("SIGINT") == 2 and "SIGINT: again: stopped at once" in done.stderr
    )
    done = run_with_faults(tmp_path / "b", "torch", 1, "--train.steps", "100000", "--train.max_seconds", "1.5")
    assert done.returncode == STOPPED and status(tmp_path / "b")["reason"] == "train.max_seconds", done.stderr
    assert list((tmp_path / "b" / "checkpoints").glob("step-*")) and "stopped after step" in done.stdout


def test_nohup_lets_a_run_outlive_its_terminal(tmp_path: Path) -> None:
    done = run_with_faults(tmp_path / "run", "torch", 1, signals=[[0, 5, "SIGHUP"]], nohup=True)
    assert done.returncode == 0 and status(tmp_path / "run")["state"] == "done", done.stderr[-3000:]


EARLY = """
import os, signal, sys
from hvdlm import cli
from hvdlm.configuration import parsing

parse = parsing.parse_config

def parse_config(*arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    return parse(*arguments)

parsing.parse_config = parse_config
code = cli.main()
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
sys.exit(code)
"""


def test_signals_count_from_the_start_to_the_very_end(tmp_path: Path) -> None:
    """A signal while options are read stops the run; at exit, signals are ignored before handlers are removed."""
    run = tmp_path / "run"
    done = run_python(["-c", EARLY, "--framework", "torch", "--log.run", str(run), *SMALL, *STEPS])
    assert done.returncode == STOPPED and "SIGUSR1: the run stops before its first step" in done.stderr, done.stderr
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 0)


FULL = os.environ.get("HVDLM_CHAOS") == "1"
# In make chaos, every transition among 1, 2 and 4 ranks; else, one to more and one to fewer ranks.
CHAIN = [1, 1, 2, 2, 4, 4, 1, 4, 2, 1] if FULL else [2, 4, 1]


def test_samples_continue_exactly_on_any_number_of_ranks(tmp_path: Path) -> None:
    seen: list[int] = []
    for number, ranks in enumerate(CHAIN):
        last = number == len(CHAIN) - 1
        signalled = [ranks - 1, 3 * number + 2]
        # The rank sleeps a moment, so that its thread has the signal before the few steps that are left have ended.
        limit = {} if last else {"signals": [[*signalled, "SIGUSR1"]], "sleep": [*signalled, 0.5]}
        resume = ["--checkpoint.resume", "auto"] if number else []
        path = tmp_path / f"rows{number}"
        done = run_with_faults(
            tmp_path / "run", "torch", ranks, *resume, launcher="mpirun" if FULL else "threads", rows=str(path), **limit
        )
        assert done.returncode == (0 if last else STOPPED), done.stderr[-3000:]
        for row, shards in read_rows(path, ranks):
            seen.append(row)
            edges = [edge for first, end, _ in shards for edge in (first, end)]
            assert edges[0] == 0 and edges[-1] == 8 and edges[1:-1:2] == edges[2:-1:2]
    assert seen == [8 * step for step in range(30)]


class Text:
    """Language-model tasks on a generated text, cached by their settings."""

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


def consumed(
    task: LanguageModel, cursor: DataCursor, batch: int, steps: int, ranks: int, prefetch: int = 0
) -> list[bytes]:
    """Return the sequences that ``steps`` steps on ``ranks`` ranks read, in order."""
    sequences = []
    config = Config(data=DataConfig(prefetch=prefetch))
    shares = [(rank * batch // ranks, (rank + 1) * batch // ranks) for rank in range(ranks)]
    runs: list[Any] = [SimpleNamespace(config=config, task=task, cursor=cursor, rows=share) for share in shares]
    with ExitStack() as stack:
        batches = [stack.enter_context(Batches(run)) for run in runs]
        for number in range(steps):
            row = cursor.advance()
            for each in batches:
                sequences += [row.tobytes() for shard in each.take(row, steps - number - 1) for row in shard.inputs]
    return sequences


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    per_rank=st.integers(1, 4),
    stops=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4])), min_size=1, max_size=5),
    sampling=st.sampled_from(["shuffled", "sequential"]),
    prefetch=st.integers(0, 3),
)
def test_stops_do_not_change_the_order_of_samples(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    per_rank: int,
    stops: list[tuple[int, int]],
    sampling: str,
    prefetch: int,
) -> None:
    batch = 4 * per_rank
    folder = Path(tmp_path_factory.getbasetemp()) / "text"
    folder.mkdir(exist_ok=True)
    task = Text.task(folder, seed, batch, 8, sampling)
    expected = consumed(task, DataCursor(batch), batch, sum(steps for steps, _ in stops), 1)
    sequences, manifest = [], {"cursor": DataCursor(batch).to_json()}
    for steps, ranks in stops:
        cursor = DataCursor.of(json.loads(json.dumps(manifest)), batch)
        sequences += consumed(task, cursor, batch, steps, ranks, prefetch)
        manifest = {"cursor": cursor.to_json()}
    assert sequences == expected


def test_a_new_batch_size_continues_with_the_next_sequence(tmp_path: Path) -> None:
    small, large = (Text.task(tmp_path, 3, batch, 8, "shuffled") for batch in (4, 6))
    first, cursor = consumed(small, before := DataCursor(4), 4, 5, 1), DataCursor.of({"cursor": before.to_json()}, 6)
    assert first + consumed(large, cursor, 6, 5, 2) == consumed(small, DataCursor(4), 4, 13, 1)[:50]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), max_size=6), st.integers(1, 25))
def test_only_left_out_rows_are_skipped(batch: int, bad: list[int], steps: int) -> None:
    cursor = DataCursor(batch)
    cursor.leave_out([batch * number for number in bad])
    read = [cursor.advance() for _ in range(steps)]
    expected = (batch * n for n in itertools.count() if n not in bad)
    assert read == list(itertools.islice(expected, steps))
    assert DataCursor.of({"cursor": cursor.to_json()}, batch).advance() == next(expected)


@pytest.mark.parametrize("config", [{}, [], {"train": {"batch_size": "8"}}, {"train": {"batch_size": 0}}])
def test_a_batch_size_that_is_no_number_is_refused(config: object) -> None:
    """Early versions saved no cursor: it follows from their configuration."""
    with pytest.raises(HvdlmError, match="data cursor is damaged"):
        DataCursor.of({"config": config, "step": 5}, 8)


def test_ranks_agree_one_step_late() -> None:
    signals = Signals(0)
    control = RunControl(SimpleNamespace(world=LocalWorld()))  # type: ignore[arg-type]
    consensus = Consensus(LocalWorld(), None, signals, control)
    assert consensus.result() == Votes() and consensus.stopped_before() is None
    consensus.vote(row=8, ready=True, skipped=False)
    signals._handle(signal.SIGTERM)
    assert consensus.result() == Votes(8, 0, 0, 1, 0) and consensus.result().row is None
    consensus.vote(row=16, ready=False, skipped=True)
    agreed = consensus.result()
    assert agreed == Votes(16, 1, 0, 0, 1) and agreed.stop_reason == "signal" and consensus.stopped_before() == "signal"
    late = Consensus(LocalWorld(), 1e-9, SimpleNamespace(received=False, abort=None), control)  # type: ignore[arg-type]
    late.vote(0, False, False)
    assert late.result().stop_reason == "train.max_seconds"
