"""The simulator of many ranks against an event-by-event simulation, closed forms and real ranks."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_simulation import World, survive_step_by_step

from hvdlm.configuration.parsing import parse_config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import idle_share
from hvdlm.planning.hardware import Hardware, read_hardware
from hvdlm.planning.simulator import Disturbances, run, simulate
from hvdlm.planning.simulator_costs import Bucket, StageCosts, StepCosts, step_costs
from hvdlm.planning.simulator_failures import Failures, best_interval, expected_seconds, survive, young_interval
from hvdlm.planning.simulator_steps import step_ends
from hvdlm.planning.step_time import predict_time
from hvdlm_planner.habits import habits_of
from hvdlm_planner.plan_command import main
from hvdlm_planner.planned_run import PlannedRun, plan_run
from hvdlm_report import scaling

MESHES = [(1, 1, 1), (8, 1, 1), (1, 4, 1), (1, 1, 3), (2, 2, 2), (3, 2, 1), (4, 3, 2), (2, 4, 4), (4, 4, 4), (64, 1, 1)]


def random_costs(draw: np.random.Generator, shape: tuple[int, int, int], exchange: str, virtual: int = 1) -> StepCosts:
    """Return random costs; some collectives take no time, others longer than the passes."""
    data, pipeline, tensor = shape

    def seconds(most: float) -> float:
        return float(draw.uniform(0, most)) * bool(draw.random() < 0.8)

    def stage() -> StageCosts:
        ready = np.sort(draw.random(draw.integers(0, 6)))
        buckets = tuple(Bucket(float(at), seconds(1.0)) for at in ready) if data > 1 else ()
        collectives = (seconds(0.3), seconds(0.3)) if tensor > 1 else (0.0, 0.0)
        gather = seconds(0.5) if exchange.startswith("zero") and data > 1 else 0.0
        last = 0.1 + seconds(3) if draw.random() < 0.5 else None
        shares = tuple(draw.dirichlet([5.0] * virtual).tolist()) if virtual > 1 else (1.0,)
        passes = seconds(1), 0.1 + seconds(2)
        return StageCosts(*passes, *collectives, buckets, seconds(0.5), gather, seconds(2), last, shares)

    few = {name: seconds(0.2) for name in ("data", "message", "metrics", "norm")}
    return StepCosts(
        Mesh(*shape),
        tuple(stage() for _ in range(pipeline)),
        int(draw.integers(1, 6)) * (pipeline if virtual > 1 else 1),
        "1f1b" if virtual > 1 else str(draw.choice(["1f1b", "gpipe"])),
        **few,
        tied=seconds(0.2) if pipeline > 1 else 0.0,
        vote=seconds(float(draw.choice([0.1, 30.0]))),
        every=3 if exchange == "local" else 1,
        warmup=int(draw.integers(0, 3)) if exchange == "local" else 0,
        every_micro_batch=exchange == "zero2",
    )


@pytest.mark.parametrize("exchange", ["all_reduce", "zero1", "zero2", "local"])
def test_ranks_end_steps_when_the_events_say(exchange: str) -> None:
    draw = np.random.default_rng(len(exchange))
    for number in range(40):
        shape = MESHES[number % len(MESHES)]
        virtual = (1, 1, 1, 3)[number // len(MESHES)] if shape[1] > 1 and exchange != "zero2" else 1
        costs, steps = random_costs(draw, shape, exchange, virtual), 7
        slowness = draw.lognormal(0, draw.choice([0, 0.3]), (steps, *shape))
        expected = World(costs, slowness).simulate().max(axis=3)
        slowest = slowness.max(axis=3)
        blocks = [slowest[:1], slowest[1:5], slowest[5:]]
        ends = np.concatenate(list(step_ends(costs, blocks, steps)))
        np.testing.assert_allclose(ends, expected, rtol=1e-12, atol=1e-12, err_msg=f"{number}: {costs}")


# Failures


@pytest.mark.parametrize("write", [0.0, 40.0, 250.0])
def test_lost_work_and_restarts_are_those_of_the_events(write: float) -> None:
    for seed in range(8):
        failures = Failures(mtbf=1000.0, restart=60.0 * (seed % 3), save=10.0 * (seed % 2), write=write)
        interval = (80.0, 300.0, 1500.0)[seed % 3]
        gaps = iter(np.random.default_rng(seed).exponential(1000.0, 5000))
        expected = survive_step_by_step(50_000.0, interval, failures, gaps)
        survived = survive(50_000.0, interval, failures, np.random.default_rng(seed))
        assert survived and survived.failures == expected["failures"] > 10
        for name in ("saves", "lost_work", "restarts"):
            assert getattr(survived, name) == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_wasted_time_is_that_of_daly_s_formula(factor: float) -> None:
    failures = Failures(mtbf=20_000.0, restart=300.0, save=60.0)
    interval, work = factor * best_interval(failures), 4e8
    survived = survive(work, interval, failures, np.random.default_rng(3))
    assert survived and survived.failures >= 10_000
    formula = 1 - work / expected_seconds(work, interval, failures)
    assert survived.wasted == pytest.approx(formula, rel=0.05)
    first_order = failures.save / interval + (interval / 2 + failures.restart) / failures.mtbf
    assert formula == pytest.approx(first_order, rel=0.1)


@pytest.mark.parametrize("save", [10.0, 600.0, 4000.0])
def test_the_best_interval_wastes_least(save: float) -> None:
    failures = Failures(mtbf=5000.0, restart=100.0, save=save)
    best = expected_seconds(1e6, best_interval(failures), failures)
    around = [expected_seconds(1e6, factor * best_interval(failures), failures) for factor in np.linspace(0.3, 3, 271)]
    assert best <= min(around) * 1.002
    assert best <= expected_seconds(1e6, young_interval(failures), failures) * (1 + 1e-12)


def test_a_run_that_never_ends_is_reported() -> None:
    assert survive(1e6, 1e6, Failures(mtbf=10.0), most=1000) is None
    assert np.isfinite(expected_seconds(1e6, 1e6, Failures(mtbf=10.0)))


# Causes


def data_parallel(ranks: int, **options: Any) -> StepCosts:
    return StepCosts(Mesh(ranks, 1, 1), (StageCosts(0.1, 0.2),), **options)


@pytest.mark.parametrize("exchange", ["all_reduce", "zero2", "local"])
def test_causes_add_up_to_the_time_of_the_run(exchange: str) -> None:
    draw = np.random.default_rng(7)
    for shape in MESHES:
        costs = random_costs(draw, shape, exchange)
        result = simulate(costs, Disturbances(0.2, 0.1, 1.5, jitter=0.2), 6)
        assert sum(result.seconds.values()) == pytest.approx(result.step) and len(result.ends) == 6
        assert min(result.seconds.values()) > -0.2 * result.step, costs  # jitter makes a single rank faster, too
        assert all(value > -1e-9 for cause, value in result.seconds.items() if cause != "jitter"), costs


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_bubble_is_the_idle_share(schedule: str) -> None:
    stages = (StageCosts(0.1, 0.2),) * 4
    result = simulate(StepCosts(Mesh(2, 4, 1), stages, 6, schedule), Disturbances(), 3)
    assert result.seconds["bubble"] / result.step == pytest.approx(idle_share(4, 6))
    assert result.efficiency == pytest.approx(1 - idle_share(4, 6))


def test_one_straggler_slows_all_ranks() -> None:
    result = simulate(data_parallel(100, micro_batches=2), Disturbances(straggler_share=0.01, straggler_factor=1.5), 5)
    assert result.seconds["stragglers"] == pytest.approx(0.3)
    assert result.seconds["compute"] == pytest.approx(0.6)


@pytest.mark.parametrize("distribution", ["lognormal", "gamma"])
def test_jitter_costs_the_largest_of_all_ranks(distribution: Any) -> None:
    """Of normal numbers, the largest of n is 1.87 standard deviations above the mean for n = 20 (order statistics)."""
    result = simulate(data_parallel(20), Disturbances(jitter=0.01, distribution=distribution), 4000)
    assert result.seconds["jitter"] / 0.3 == pytest.approx(1.867 * 0.01, rel=0.03)


def test_local_sgd_averages_jitter_over_a_round() -> None:
    """The sum of 25 steps has 1 / 5 of the relative jitter; votes, one step late, keep no rank waiting by much."""
    jitter = Disturbances(jitter=0.05)
    dense, local = (simulate(data_parallel(64, every=every), jitter, 1000).seconds["jitter"] for every in (1, 25))
    voting = simulate(data_parallel(64, every=25, vote=0.01), jitter, 1000).seconds["jitter"]
    assert local == pytest.approx(dense / 5, rel=0.15) and local <= voting < 1.1 * local


def test_results_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, disturbed = (
        random_costs(np.random.default_rng(5), (4, 2, 2), "all_reduce"),
        Disturbances(0.1, 0.1, 2, 0.05, 0.1),
    )
    ends = run(costs, disturbed, 40)
    monkeypatch.setattr("hvdlm.planning.simulator._BLOCK", 16 * costs.micro_batches * 3)
    np.testing.assert_allclose(run(costs, disturbed, 40), ends, rtol=1e-12)
    assert not np.allclose(run(costs, Disturbances(0.1, 0.1, 2, 0.05, 0.1, seed=2), 40), ends)


# The command

SMALL = [
    "--hardware",
    "h100",
    "--model.name",
    "gpt",
    "--model.layers",
    "4",
    "--model.width",
    "256",
    "--model.heads",
    "4",
]
SMALL += ["--model.vocab", "1000", "--train.batch_size", "64", "--train.micro_batch_size", "1"]


def plan(*arguments: str) -> str:
    """Return what ``plan`` prints for a small model on 64 ranks, simulated."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["--simulate", "--ranks", "64", *SMALL, *arguments]) == 0
    return output.getvalue()


def small_run(*arguments: str) -> tuple[PlannedRun, Hardware]:
    hardware = replace(read_hardware("h100"), speed_deviation=0.0)
    return plan_run(parse_config([*SMALL[2:], *arguments], "plan"), hardware), hardware


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--communication.bucket_bytes", "100000", "--train.batch_size", "256"],
        ["--parallel.pipeline", "4", "--parallel.tensor", "2", "--train.batch_size", "512"],
        ["--parallel.zero", "1"],
        ["--parallel.zero", "2", "--train.batch_size", "256"],
        ["--communication.exchange", "diloco"],
        ["--communication.compression.algorithm", "int8"],
        ["--parallel.data", "1", "--parallel.tensor", "4"],
    ],
)
def test_undisturbed_steps_take_the_predicted_seconds(options: list[str]) -> None:
    planned, hardware = small_run("--parallel.data", "64", *options)
    habits = habits_of(planned.config)
    arguments = planned.config, planned.spec, planned.mesh, hardware, planned.moments, habits
    predicted, costs = predict_time(*arguments), step_costs(*arguments)
    assert predicted and costs
    # ZeRO-2's collectives overlap with the next forward pass, too, and compression delays buckets.
    rel = 0.1 if "zero" in str(options) or "int8" in options else 0.03
    assert simulate(costs[0], Disturbances(), 100).step == pytest.approx(predicted.seconds - predicted.save, rel=rel)


@pytest.mark.parametrize(
    "options",
    [
        ["--parallel.data", "64", "--communication.bucket_bytes", "100000", "--train.batch_size", "256"],
        ["--parallel.data", "8", "--parallel.pipeline", "4", "--parallel.tensor", "2", "--train.batch_size", "512"],
    ],
)
def test_what_is_measured_beside_computation_is_simulated(options: list[str]) -> None:
    """Collectives that computation slows down, tensor ranks that wait, passes that cost more than they compute."""
    planned, hardware = small_run(*options)
    measured = {"collective_slowdown": 2.0, "overlap_slowdown": 1.5, "blocking_factor": 1.5, "blocking_seconds": 1e-5}
    rates = tuple(replace(rates, pass_seconds=1e-4, **measured) for rates in hardware.rates)  # type: ignore[arg-type]
    hardware = replace(hardware, rates=rates)
    arguments = planned.config, planned.spec, planned.mesh, hardware, planned.moments, habits_of(planned.config)
    predicted, costs = predict_time(*arguments), step_costs(*arguments)
    assert predicted and costs
    assert simulate(costs[0], Disturbances(), 100).step == pytest.approx(predicted.seconds - predicted.save, rel=0.03)


def test_the_plan_says_where_the_time_goes_and_why() -> None:
    options = [
        "--stragglers",
        "0.02",
        "--jitter",
        "0.05",
        "--rank_mtbf",
        "30d",
        "--save",
        "20s",
        "--save_write",
        "1min",
    ]
    text = plan(*options, "--checkpoint.every", "100000", "--train.steps", "10000000")
    assert "ranks     64: 64 x 1 x 1 (data x pipeline x tensor), on H100 SXM" in text
    assert "2% of the ranks always slow (x 1.5); speeds differ by 4.5%; lognormal jitter of 5%; seed 1" in text
    assert "one in 11.2 h on all ranks; 5 min until training continues; a save pauses 20 s and is complete" in text
    rows = {line.split("   ")[0].strip(): line for line in text.splitlines() if line.startswith("  ")}
    causes = ("compute", "communication", "stragglers", "jitter", "saves", "lost work", "restarts")
    shares = [float(rows[cause].partition("%")[0].split()[-1]) for cause in causes]
    assert sum(shares) == pytest.approx(100, abs=0.5) and "bubble" not in rows
    assert "all wait for the slowest of 64 ranks" in text and "by Daly's formula (2006)" in text
    best, configured = (
        float(re.search(rf"([\d.]+)% of the time.*\({n}\)", text)[1]) for n in ("best", "as configured")
    )
    assert best < configured


def test_the_scaling_is_a_file_that_the_report_draws(tmp_path: Path) -> None:
    files = [tmp_path / "dense.json", tmp_path / "local.json"]
    options = ["--jitter", "0.1", "--node_mtbf", "100d", "--save", "5s", "--simulated_steps", "20"]
    printed = plan(*options, "--scaling", str(files[0]))
    assert "with 1 sequence(s) on each of its ranks (weak scaling)" in printed
    plan(*options, "--scaling", str(files[1]), "--communication.exchange", "diloco")
    rows = json.loads(files[0].read_text())["rows"]
    assert [row["ranks"] for row in rows] == [2**n for n in range(3, 13)]
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in rows)
    assert [row["efficiency"] for row in rows] == sorted((row["efficiency"] for row in rows), reverse=True)
    page = tmp_path / "page.html"
    sentences = scaling.write(files, page)
    assert len(sentences) == 2 and "efficiency" in sentences[0] and "on 4,096, where most is lost to" in sentences[0]
    text = page.read_text()
    for title in ("Efficiency", "Throughput of a rank", "Lost to jitter", "Lost to restarts"):
        assert f"<figcaption>{title}" in text
    assert 'aria-label="Efficiency over ranks"' in text and ">4096</text>" in text and "on % ranks" in text
    assert text.count('class="run1"') >= 6 and "4,096 ranks" in text and "Lost to bubble" not in text


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "x", "name": "n", "rows": []}', '{"kind": "scaling"}'])
def test_a_damaged_file_of_a_scaling_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(content)
    with pytest.raises(HvdlmError, match=r"scaling.json: the curves can't be read: "):
        scaling.write([path], tmp_path / "page.html")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--jitter", "much"], "--jitter: got much, expected a number from 0 to 10"),
        (["--node_mtbf", "3 weeks", "--save", "1s"], "--node_mtbf: got 3 weeks, expected a duration such as 90s"),
        (["--node_mtbf", "3y"], "no save_bytes_per_second: give it as --save 20s"),
        (["--ranks", "63", "--parallel.tensor", "2"], "--ranks: got 63, expected a multiple of parallel.pipeline x"),
        (["--jitter_distribution", "cauchy"], "expected lognormal or gamma"),
        (["--communication.exchange", "streaming_diloco"], "--simulate: ranks wait for each other at the end"),
    ],
)
def test_wrong_options_of_a_simulation_are_refused(options: list[str], sentence: str) -> None:
    with pytest.raises(HvdlmError, match=re.escape(sentence)):
        plan(*options)


def test_a_run_that_saves_too_rarely_never_ends() -> None:
    text = plan(
        "--rank_mtbf", "10s", "--restart", "0s", "--save", "1s", "--train.steps", "30000", "--checkpoint.every", "0"
    )
    assert "the run never ends" in text
