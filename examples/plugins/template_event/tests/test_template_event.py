"""Tests the event plugin by calling its hooks as a run would."""

import json
from types import SimpleNamespace

import pytest
from template_event import SlowSteps, SlowStepsOptions

from hvdlm.config import Config
from hvdlm.errors import HvdlmError


def run(config, seconds, rank=0):
    plugin = SlowSteps()
    plugin.hvdlm_run_started(config, SimpleNamespace(rank=rank), {"start_step": 0})
    for step, duration in enumerate(seconds, 1):
        plugin.hvdlm_step_ended(step, duration)
    plugin.hvdlm_run_ended()


@pytest.fixture
def config(tmp_path):
    config = Config(plugin_options={"slow_steps": SlowStepsOptions(factor=3.0, most=2)})
    config.log.run = str(tmp_path)
    return config


def test_slow_steps_are_recorded(config, tmp_path):
    run(config, [9.0, 1.0, 1.0, 4.0, 1.0])
    lines = [json.loads(line) for line in (tmp_path / "slow_steps.jsonl").read_text().splitlines()]
    assert lines == [{"step": 4, "seconds": 4.0, "mean": 1.0}]


def test_no_more_than_the_maximum_are_recorded(config, tmp_path):
    run(config, [1.0, 1.0, 100.0, 1000.0, 10000.0])
    assert len((tmp_path / "slow_steps.jsonl").read_text().splitlines()) == 2


def test_other_ranks_write_nothing(config, tmp_path):
    run(config, [1.0, 1.0, 9.0], rank=1)
    assert list(tmp_path.iterdir()) == []


def test_a_factor_of_1_is_refused(config):
    config.plugin_options["slow_steps"].factor = 1.0
    with pytest.raises(HvdlmError, match=r"slow_steps.factor is 1 or less"):
        SlowSteps().hvdlm_check(config)
