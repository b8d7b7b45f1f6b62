"""Automatic communication: decisions from measured numbers; runs on slow links, throttled links, after a kill."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import both_frameworks
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import make_layout
from hvdlm_auto import checks, losses
from hvdlm_auto.decision_log import ENTRY, Decision, DecisionLog, Trial, read_log
from hvdlm_auto.decisions import (
    CLOSE,
    EQUAL,
    HIDDEN,
    Backward,
    BucketCost,
    Candidate,
    Choice,
    Line,
    cheapest,
    choose,
    predict,
    wire_changed,
)
from launching import ONE_LAYER, ROOT, SMALL, WITH_STEP_HOOK, launch
from launching import losses as logged_losses

# Decisions

BYTES = {"dense": 4.0, "fp16": 2.0, "int8": 1.0, "scaled_sign": 0.15}  # of an element
NANOSECONDS = {"dense": 0.0, "fp16": 0.5, "int8": 6.0, "scaled_sign": 8.0}  # of computation for an element


def candidates(elements: list[int], megabits: float, latency: float = 1e-4) -> list[Candidate]:
    """Return dense sums and three compressors on a wire of so many Mbit/s."""
    line, made = Line(latency, 8e-6 / megabits), []
    for name, size in BYTES.items():
        own = 1e-9 * NANOSECONDS[name]
        costs = tuple(BucketCost(own * n / 2, line.seconds(size * n), 0.0, own * n / 2) for n in elements)
        made.append(Candidate(name, losses.TABLE[name].gap if name in losses.TABLE else 0.0, costs))
    return made


def backward(elements: list[int], step: float) -> Backward:
    return Backward(2 / 3 * step, step, tuple(n / sum(elements) for n in elements))


models = st.lists(st.integers(1, 10**7), min_size=1, max_size=20)
speeds = st.floats(1.0, 1e6)
steps = st.floats(1e-3, 10.0)


@given(models, speeds, steps, st.floats(0.0, 1.0))
def test_a_lossless_method_that_hides_beats_all_lossy_ones(
    elements: list[int], megabits: float, step: float, gap: float
) -> None:
    known, passes = candidates(elements, megabits), backward(elements, step)
    choice = choose(known, passes, gap)
    dense = predict(known[0], passes)
    if dense.added <= HIDDEN * dense.seconds:
        assert choice.name == "dense" and not choice.tried and "hides behind" in choice.reason


@given(models, speeds, steps)
def test_without_a_gap_no_lossy_method_is_chosen_or_tried(elements: list[int], megabits: float, step: float) -> None:
    choice = choose(candidates(elements, megabits), backward(elements, step), 0.0)
    assert choice.name == "dense" and not choice.tried


@given(models, speeds, steps, st.sampled_from([0.001, 0.05, 0.1]))
def test_what_is_chosen_and_tried_is_within_the_gap(
    elements: list[int], megabits: float, step: float, gap: float
) -> None:
    known, passes = candidates(elements, megabits), backward(elements, step)
    choice = choose(known, passes, gap)
    seconds = {c.name: predict(c, passes).seconds for c in known if c.gap <= gap}
    assert {choice.name, *choice.tried} <= set(seconds)
    least = min(seconds.values())
    assert seconds[choice.name] <= max(1 + EQUAL, 1 / (1 - HIDDEN)) * least * (1 + 1e-9)
    assert all(seconds[name] <= CLOSE * seconds[choice.name] for name in choice.tried)


@given(models, speeds, st.floats(1.0, 1e3), steps, st.sampled_from([0.0, 0.001, 0.1]))
def test_a_faster_wire_makes_no_step_slower_nor_lossy(
    elements: list[int], megabits: float, factor: float, step: float, gap: float
) -> None:
    passes = backward(elements, step)
    slow, fast = (candidates(elements, megabits * f) for f in (1.0, factor))
    names = [choose(known, passes, gap).name for known in (slow, fast)]
    seconds = [
        predict(next(c for c in known if c.name == name), passes).seconds
        for known, name in zip((slow, fast), names, strict=True)
    ]
    assert seconds[1] <= seconds[0] * (1 + EQUAL) * (1 + HIDDEN) / (1 - HIDDEN)
    if "hides behind" in choose(slow, passes, gap).reason:
        assert names == ["dense", "dense"]


def test_exposed_seconds_are_those_of_buckets_in_their_order() -> None:
    costs = (BucketCost(0.0, 3.0), BucketCost(1.0, 2.0, later=0.5, finish=0.25))
    predicted = predict(Candidate("x", 0.0, costs), Backward(4.0, 10.0, (0.5, 0.5)))
    # The first bucket travels from 2 to 5, where the passes and the second one's compression end; 2 s follow.
    assert predicted.added == pytest.approx(1.0 + 2.0 + 0.5 + 0.25)
    assert predicted.seconds == pytest.approx(13.75)


def test_a_wire_is_slow_fast_or_in_between() -> None:
    elements = [10**6] * 10
    chosen = [choose(candidates(elements, speed), backward(elements, 0.5), 0.001) for speed in (100, 800, 1e4)]
    assert [choice.name for choice in chosen] == ["int8", "fp16", "dense"]
    assert choose(candidates(elements, 100), backward(elements, 0.5), 0.1).name == "scaled_sign"
    close = choose(candidates(elements, 700), backward(elements, 0.3), 0.001)
    assert len(close.tried) > 1 and close.tried[0] == close.name


def test_of_equally_fast_methods_the_least_gap_is_kept() -> None:
    gaps = {"dense": 0.0, "fp16": 0.001, "sign": 0.06}
    assert cheapest({"dense": 1.0 + EQUAL / 2, "fp16": 1.0, "sign": 1.001}, gaps) == "dense"
    assert cheapest({"dense": 1.1, "fp16": 1.01, "sign": 1.0}, gaps) == "fp16"
    assert cheapest({"dense": 2.0, "fp16": 1.5, "sign": 1.0}, gaps) == "sign"


def test_a_wire_has_changed_where_a_megabyte_takes_longer() -> None:
    before = {"all_reduce float32": Line(1e-4, 1e-8)}
    for per_byte, changed in ((1e-8, False), (1.3e-8, False), (2e-8, True), (1e-7, True), (3e-9, True)):
        assert wire_changed(before, {"all_reduce float32": Line(1e-4, per_byte)}, 1.5) == changed


# The table of losses


def test_the_losses_are_those_of_the_document() -> None:
    text = (ROOT / "docs" / "compression.md").read_text()
    assert f"| dense | | 1x | {losses.DENSE} | {losses.DENSE} |" in text
    elsewhere = {
        "power_sgd": r"`power_sgd` reaches (\d\.\d+)",
        "top_k": r"`power_sgd` reaches [\d.]+ and `top_k` (\d\.\d+)",
    }
    for name, entry in losses.TABLE.items():
        row = re.search(rf"^\| `{name}`[^|]*\|([^|]*)\|[^|]*\| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
        if name in elsewhere:
            match = re.search(elsewhere[name], text)
            assert match and float(match[1]) == entry.losses[0], name
        else:
            assert row and (float(row[2]), float(row[3])) == entry.losses, name
            options = dict(re.findall(r"--communication\.compression\.(\w+) ([\d.]+)", row[1]))
            assert {key: float(value) for key, value in options.items()} == entry.options, name
            assert "train." not in row[1]
    assert min(entry.gap for entry in losses.TABLE.values()) == losses.RESOLUTION > 0


# The log


def test_a_log_is_read_as_it_was_written() -> None:
    log = DecisionLog(
        {"ranks": 2},
        [Decision(0, "dense", "a reason"), Decision(7, "int8", "another")],
        {"all_reduce float32": Line(1e-4, 1.25e-8)},
        candidates([1000, 20], 100.0),
        {"dense": [[["all_reduce float32", 4000.0, 0]], []]},  # type: ignore[list-item]
        {"int8": [1e-9, 2e-9]},
        0.1,
        0.3,
        (0.4, 0.1),
        {"int8": 0.5},
        ["top_k"],
        9,
        True,
        Trial(3, 6, ["dense", "int8"], [0.125]),
        "int8",
    )
    state = log.state()
    assert read_log(state[ENTRY]) == log and state[ENTRY].dtype == np.uint8
    assert [log.method(step) for step in (0, 6, 7, 100)] == ["dense", "dense", "int8", "int8"]
    assert DecisionLog().state() == {} and asdict(Choice("dense", "why"))["tried"] == ()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.floats(1.0, 100000.0))
def test_buckets_are_sent_together_in_their_order(sizes: list[int], least: float) -> None:
    from hvdlm_auto.layouts import runs_of

    params = [ParamSpec(f"p{i}", (n,), ("a",), Init("zeros")) for i, n in enumerate(sizes)]
    layout = make_layout(params, 2000)
    runs = runs_of(layout, least)
    assert [index for run in runs for index in run] == list(range(len(layout.buckets)))
    ranges = [layout.bucket_range(index) for index in range(len(layout.buckets))]
    sent = [4 * (ranges[run[-1]][1] - ranges[run[0]][0]) for run in runs]
    assert all(size >= least for size in sent[:-1])
    alone = [4 * (ranges[run[-1]][0] - ranges[run[0]][0]) for run in runs]
    assert all(size < least for size in alone)


# What is refused


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    """Yield options and what the error says."""
    yield {"communication.exchange": "diloco"}, "exchange diloco: the ranks of rounds differ"
    yield {"communication.compression.algorithm": "int8"}, "options of communication.compression: it chooses"
    yield {"communication.compression.rank": 2}, "options of communication.compression: it chooses"
    yield {"communication.reduction": "exact"}, "reduction exact: compressors only add gradients up"
    yield {"communication.reduction": "adasum"}, "reduction adasum"
    yield {"communication.autotune": True}, "Horovod would change the times"
    yield {"parallel.zero": 1}, "parallel.zero 1: compressors need whole gradients"
    yield {"parallel.tensor": 2}, "above 1: it predicts the backward pass"
    yield {"parallel.pipeline": 2}, "above 1: it predicts the backward pass"
    yield {"communication.max_loss_gap": 0.1, "train.precision": "fp16"}, "in train.precision fp16"
    yield {"framework": "jax"}, "framework jax: its plugin doesn't change the method"
    yield {"communication.auto": False, "communication.max_loss_gap": 0.1}, "set that, too, or leave it out"
    yield {"communication.exchange": "auto"}, "set --communication.auto true"


@pytest.mark.parametrize(("options", "message"), list(refusals()), ids=lambda value: str(value)[:40])
def test_what_automatic_communication_can_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    config = Config.load({"communication.auto": True}, {k: v for k, v in options.items() if k != "framework"})
    config.framework = options.get("framework", "torch")
    with pytest.raises(HvdlmError) as error:
        checks.check(config)
    assert message in str(error.value) and str(error.value).count(". ") == 0


def test_a_refused_combination_ends_the_command() -> None:
    options = ["--communication.auto", "true", "--communication.compression.algorithm", "int8"]
    done = launch("threads", 2, ["-m", "hvdlm", *SMALL, *options])
    assert done.returncode == 2 and "communication.auto can't be combined with" in done.stderr
    done = launch("threads", 2, ["-m", "hvdlm", *SMALL, "--communication.max_loss_gap", "0.1"])
    assert done.returncode == 2 and "set that, too, or leave it out" in done.stderr


# Runs

# The decisions of these runs are clear: two compressors whose bytes differ by far, and no trials.
CLEAR = """
import hvdlm_auto.decisions, hvdlm_auto.losses, hvdlm_auto.periods
for name in set(hvdlm_auto.losses.TABLE) - {{"int8", "scaled_sign"}}:
    del hvdlm_auto.losses.TABLE[name]
hvdlm_auto.decisions.CLOSE, hvdlm_auto.periods.INTERVAL = {close}, 4
"""
OPTIONS = [
    *SMALL,
    *ONE_LAYER,
    "--model.width",
    "64",
    "--train.steps",
    "24",
    "--train.warmup",
    "2",
    "--communication.auto",
    "true",
]
OPTIONS += [
    "--train.eval_every",
    "0",
    "--data.validation_share",
    "0.004",
    "--checkpoint.every",
    "20",
    "--checkpoint.asynchronous",
    "false",
    "--plugins",
    "[injected]",
]
SLOW = "1 MB/s"  # on which dense sums take several times as long as the rest of a step
THROTTLED_AT = 10


def train(
    folder: Path,
    framework: str,
    links: list[dict[str, Any]],
    *options: str,
    gap: float = 0.001,
    action: str = "pass",
    close: float = 1.0,
    ranks: int = 2,
) -> str:
    """Train on ranks that are threads; return what rank 0 printed."""
    conditions = folder.parent / f"{folder.name}.yaml"
    conditions.write_text(yaml.safe_dump({"links": links}))
    command = [
        "-c",
        CLEAR.format(close=close) + WITH_STEP_HOOK.format(action=action),
        "--framework",
        framework,
        "--log.run",
        str(folder),
        *OPTIONS,
    ]
    command += ["--injected.file", str(conditions), "--communication.max_loss_gap", str(gap), *options]
    done = launch("threads", ranks, command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def decisions(folder: Path) -> list[tuple[int, str]]:
    """Return (first step, method) of every decision in a run's summary."""
    summary = json.loads((folder / "summary.json").read_text())
    return [(entry["step"], entry["method"]) for entry in summary["communication"]["decisions"]]


THROTTLED = [{"between": "all", "bandwidth": SLOW, "from_step": THROTTLED_AT}]


@pytest.fixture(scope="module")
def throttled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a framework to the folder and the output of a run whose link is throttled."""
    runs: dict[str, tuple[Path, str]] = {}

    def run(framework: str) -> tuple[Path, str]:
        if framework not in runs:
            folder = tmp_path_factory.mktemp("throttled") / "run"
            runs[framework] = folder, train(folder, framework, THROTTLED)
        return runs[framework]

    return run


@both_frameworks
def test_a_throttled_link_is_noticed_and_compressed(throttled: Any, framework: str) -> None:
    folder, output = throttled(framework)
    made = decisions(folder)
    assert made[0] == (1, "dense") and [method for _, method in made[1:]] == ["int8"], output
    assert THROTTLED_AT < made[1][0] <= THROTTLED_AT + 2 * 4 + 1
    assert "the wire has changed" in output and len(logged_losses(folder)) == 24


@both_frameworks
def test_a_resumed_run_replays_decisions_and_losses(throttled: Any, tmp_path: Path, framework: str) -> None:
    folder, _ = throttled(framework)
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000024")
    (resumed / "summary.json").unlink()
    output = train(resumed, framework, THROTTLED, "--checkpoint.resume", "auto")
    assert "steps 20 to 24" in output and "resumes with int8" in output and "measured in" not in output
    assert decisions(resumed) == decisions(folder)
    assert logged_losses(resumed) == logged_losses(folder)


@pytest.mark.parametrize(
    "framework",
    [
        "torch",
        pytest.param(
            "tensorflow",
            marks=pytest.mark.full(covered_by="torch, as decisions are made in numpy; int8 by the throttled link"),
        ),
    ],
)
def test_a_slow_link_is_compressed_only_where_the_gap_allows(tmp_path: Path, framework: str) -> None:
    links = [{"between": "all", "bandwidth": SLOW}]
    steps = ["--train.steps", "3", "--checkpoint.every", "0"]
    train(tmp_path / "lossless", framework, links, *steps, gap=0.0)
    assert decisions(tmp_path / "lossless") == [(1, "dense")]
    train(tmp_path / "lossy", framework, links, *steps, gap=0.001)
    assert decisions(tmp_path / "lossy") == [(1, "int8")]


@both_frameworks
def test_a_growing_residual_returns_the_run_to_dense_sums(tmp_path: Path, framework: str) -> None:
    links = [{"between": "all", "bandwidth": SLOW}]
    action = """pass

    @hookimpl
    def hvdlm_run_started(self, run):
        exchange = run.opened.exchange
        residual = exchange.residual
        exchange.residual = lambda: residual() and 10.0 ** exchange.next_step
"""
    output = train(tmp_path / "run", framework, links, "--train.steps", "12", gap=0.1, action=action)
    made = decisions(tmp_path / "run")
    assert made == [(1, "scaled_sign"), (9, "dense")], output
    assert "the error feedback of" in output


def test_methods_that_are_close_are_tried_in_training(tmp_path: Path) -> None:
    links = [{"between": "all", "bandwidth": SLOW}]
    steps = ["--train.steps", "50", "--checkpoint.every", "0"]
    output = train(tmp_path / "run", "torch", links, *steps, close=100.0)
    made = decisions(tmp_path / "run")
    turns = [step for step, _ in made]
    assert made[0][1] == made[-1][1] == "int8" and "the fastest in training" in output
    assert turns == list(range(1, 6 * len(made), 6)) and len({method for _, method in made}) > 1


def test_other_ranks_measure_anew_after_a_resume(tmp_path: Path) -> None:
    links = [{"between": "all", "bandwidth": SLOW}]
    train(tmp_path / "run", "torch", links, "--train.steps", "3")
    options = ["--train.steps", "5", "--checkpoint.resume", "auto"]
    output = train(tmp_path / "run", "torch", links, *options, ranks=4)
    assert "measures anew" in output and decisions(tmp_path / "run") == [(4, "int8")]


def test_one_rank_has_nothing_to_choose(tmp_path: Path) -> None:
    command = ["-m", "hvdlm", *SMALL, "--train.steps", "2", "--communication.auto", "true"]
    done = launch("threads", 1, [*command, "--log.run", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert "communication" not in json.loads((tmp_path / "run" / "summary.json").read_text())
