"""The simulator of many ranks against an event-by-event simulation, closed forms and real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from event_simulation import World, survive_step_by_step

from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.pipeline_schedules import idle_share
from hvdlm.planning.simulator import Disturbances, run, simulate
from hvdlm.planning.simulator_costs import Bucket, StageCosts, StepCosts
from hvdlm.planning.simulator_failures import Failures, best_interval, expected_seconds, survive, young_interval
from hvdlm.planning.simulator_steps import step_ends

MESHES = [(1, 1, 1), (8, 1, 1), (1, 4, 1), (1, 1, 3), (2, 2, 2), (3, 2, 1), (4, 3, 2), (2, 4, 4), (4, 4, 4), (64, 1, 1)]


def random_costs(draw: np.random.Generator, shape: tuple[int, int, int], exchange: str) -> StepCosts:
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
        return StageCosts(seconds(1), 0.1 + seconds(2), *collectives, buckets, seconds(0.5), gather, seconds(2), last)

    few = {name: seconds(0.2) for name in ("data", "message", "metrics", "norm")}
    return StepCosts(
        Mesh(*shape),
        tuple(stage() for _ in range(pipeline)),
        int(draw.integers(1, 6)),
        str(draw.choice(["1f1b", "gpipe"])),
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
        costs, steps = random_costs(draw, shape, exchange), 7
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
        result = simulate(costs, Disturbances(0.2, 0.1, 1.5, 0.2), 6)
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
    costs, disturbed = random_costs(np.random.default_rng(5), (4, 2, 2), "all_reduce"), Disturbances(0.1, 0.1, 2, 0.1)
    ends = run(costs, disturbed, 40)
    monkeypatch.setattr("hvdlm.planning.simulator._BLOCK", 16 * costs.micro_batches * 3)
    np.testing.assert_allclose(run(costs, disturbed, 40), ends, rtol=1e-12)
    assert not np.allclose(run(costs, Disturbances(0.1, 0.1, 2, 0.1, seed=2), 40), ends)
