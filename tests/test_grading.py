"""Grading of runs: measured seconds of a step by cause beside predicted ones, and what an error leads to."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import ThreadRanks
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.types import StepResult, Traffic
from hvdlm_planner import grades, grading
from hvdlm_planner.grading import Grading, StepSecondsLine
from hvdlm_planner.measured_steps import CAUSES, MeasuredSteps, slowest


def add_steps(steps: MeasuredSteps, seconds: list[float], ends: int = 1, **parts: float) -> None:
    """Add steps; every ``ends``-th of them ends a round."""
    for number, value in enumerate(seconds, 1):
        result = StepResult(1.0, 100.0, 0.5, parts.get("comm", 0.0), idle_seconds=parts.get("idle", 0.0))
        result.data_seconds = parts.get("data", 0.0)
        steps.add(result, value, number % ends == 0)


def test_causes_add_up_to_the_median_step() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [9.0, 5.0, 1.0, 1.2, 7.0], comm=0.3, idle=0.1, data=0.05)
    steps.add_save(4.0)
    parts = steps.parts(save_every=20, tensor_seconds=0.1)
    assert parts is not None
    assert parts == pytest.approx(
        {"seconds": 1.4, "compute": 0.75, "communication": 0.3, "bubble": 0.1, "data": 0.05, "save": 0.2}
    )
    assert parts["seconds"] == pytest.approx(sum(parts[cause] for cause in CAUSES))


def test_first_steps_are_left_out_and_too_few_give_nothing() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [9.0, 5.0])
    assert steps.parts(10) is None and steps.steady == 0
    steps = MeasuredSteps(unsteady=5)  # for example, of a compressor that starts after five steps
    add_steps(steps, [9.0] * 5 + [1.0])
    assert (steps.parts(0) or {})["seconds"] == 1.0


def test_a_round_of_diloco_counts_with_its_synchronisation() -> None:
    steps = MeasuredSteps(unsteady=4)
    add_steps(steps, [9.0] * 4 + [1.0, 1.0, 1.0, 5.0] * 3, ends=4)
    assert steps.blocks == 3 and (steps.parts(0) or {})["seconds"] == 2.0


def test_saves_at_the_end_alone_are_no_cost_of_a_step() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [1.0] * 4)
    steps.add_save(100.0)
    assert (steps.parts(save_every=0) or {})["save"] == 0.0


def test_the_slowest_rank_is_the_one_that_computes_longest() -> None:
    assert slowest([{"compute": 1.0}, {"compute": 2.0}]) == 1
    assert slowest([{"compute": 1.0}, None]) is None
