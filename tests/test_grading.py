"""Grading of runs: measured seconds of a step by cause beside predicted ones, and what an error leads to."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import ThreadRanks, both_frameworks, read_json
from hvdlm import cli
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.planning.hardware import Hardware, Link, Rates, read_hardware, write_hardware
from hvdlm.protocols.types import StepResult, Traffic
from hvdlm_planner import grades, grading
from hvdlm_planner.grading import Grading, StepSecondsLine
from hvdlm_planner.measured_steps import CAUSES, MeasuredSteps, slowest
from launching import SMALL, run_python


def add_steps(steps: MeasuredSteps, seconds: list[float], ends: int = 1, **causes: float) -> None:
    """Add steps; every ``ends``-th of them ends a round."""
    for number, value in enumerate(seconds, 1):
        result = StepResult(1.0, 100.0, 0.5, causes.get("comm", 0.0), idle_seconds=causes.get("idle", 0.0))
        result.data_seconds = causes.get("data", 0.0)
        steps.add(result, value, number % ends == 0)


def test_causes_add_up_to_the_median_step() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [9.0, 5.0, 1.0, 1.2, 7.0], comm=0.3, idle=0.1, data=0.05)
    steps.add_save(4.0)
    causes = steps.by_cause(save_every=20, tensor_seconds=0.1 / 1.2 * 9.2)  # the same share of all steps
    assert causes is not None
    assert causes == pytest.approx(
        {"seconds": 1.4, "compute": 0.75, "communication": 0.3, "bubble": 0.1, "data": 0.05, "save": 0.2}
    )
    assert causes["seconds"] == pytest.approx(sum(causes[cause] for cause in CAUSES))


def test_first_steps_are_left_out_and_too_few_give_nothing() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [9.0, 5.0])
    assert steps.by_cause(10) is None and steps.steady == 0
    steps = MeasuredSteps(unsteady=5)  # for example, of a compressor that starts after five steps
    add_steps(steps, [9.0] * 5 + [1.0])
    assert (steps.by_cause(0) or {})["seconds"] == 1.0


def test_a_round_of_diloco_counts_with_its_synchronisation() -> None:
    steps = MeasuredSteps(unsteady=4)
    add_steps(steps, [9.0] * 4 + [1.0, 1.0, 1.0, 5.0] * 3, ends=4)
    assert steps.blocks == 3 and (steps.by_cause(0) or {})["seconds"] == 2.0


def test_saves_at_the_end_alone_are_no_cost_of_a_step() -> None:
    steps = MeasuredSteps()
    add_steps(steps, [1.0] * 4)
    steps.add_save(100.0)
    assert (steps.by_cause(save_every=0) or {})["save"] == 0.0


def test_the_slowest_rank_is_the_one_that_computes_longest() -> None:
    assert slowest([{"compute": 1.0}, {"compute": 2.0}]) == 1
    assert slowest([{"compute": 1.0}, None]) is None


class Ranks:
    """Ranks that each train some steps, of which they are the only source of figures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 2) -> None:
        self.threads = ThreadRanks(size)
        self.config = Config()
        self.prediction: grading.RunPrediction | None = None
        monkeypatch.setattr(grading, "predict", lambda run: self.prediction)
        monkeypatch.setattr(grading, "check", lambda config: None)

    def run(self, seconds: list[float], tensor: float = 0.0) -> list[dict[str, Any]]:
        """Return the summaries of ranks that do 20 steps of these ``seconds`` each, of which 0.1 s are data."""

        def train(world: Any) -> dict[str, Any]:
            traffic = {"tensor/all_reduce": Traffic(), "gradients/all_reduce": Traffic()}
            opened = SimpleNamespace(
                config=self.config,
                world=world,
                exchange=SimpleNamespace(agreed=True),
                trainable=SimpleNamespace(traffic=lambda: traffic),
            )
            plugin = Grading(self.config)
            plugin.hvdlm_run_started(SimpleNamespace(opened=opened))
            for _ in range(20):
                traffic["tensor/all_reduce"].seconds += tensor
                result = StepResult(1.0, 100.0, 0.5, max(seconds) - seconds[world.rank])
                result.data_seconds = 0.1
                plugin.hvdlm_step_ended(result, max(seconds))
            plugin.hvdlm_checkpoint_saved(5.0)
            summary: dict[str, Any] = {}
            plugin.hvdlm_run_ended(summary)
            return summary

        return self.threads.run(train)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


RATES = Rates(1e12, 1e11, framework="torch", precision="fp32")
MACHINE = Hardware("test machine", "", "", (RATES,), {"node": Link(0, 1e9), "network": Link(0, 1e9)})
KIND = "torch", "fp32"


def measured_anew(factor: float = 2.0, **changes: Any) -> Hardware:
    """Return the machine with rates that were measured again."""
    return replace(MACHINE, rates=(replace(RATES, memory_bytes_per_second=factor * 1e11, **changes),))


def prediction(path: Path | None, seconds: float) -> grading.RunPrediction:
    causes = {"seconds": seconds, "compute": seconds, **dict.fromkeys(CAUSES[1:], 0.0)}
    return grading.RunPrediction(causes, "test machine", grades.checksum(MACHINE, *KIND), path and error_file(path))


def error_file(path: Path) -> Path:
    return grades.path_of(path, *KIND)


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    return tmp_path / "machine.yaml"


def test_the_summary_has_the_slowest_rank_beside_the_prediction(ranks: Ranks, hardware: Path) -> None:
    ranks.config.checkpoint.every = 50
    ranks.prediction = prediction(hardware, 1.1)
    first, second = ranks.run([0.8, 1.0], tensor=0.2)
    assert first == second  # on every rank
    figures = first["step_seconds"]
    assert figures["rank"] == 1 and figures["steps"] == 18 and figures["hardware"] == "test machine"
    assert figures["measured"] == pytest.approx(
        {"seconds": 1.1, "compute": 0.7, "communication": 0.2, "bubble": 0.0, "data": 0.1, "save": 0.1}
    )
    assert figures["predicted"]["seconds"] == 1.1 and figures["error"] == pytest.approx(0.0)


def test_without_measurements_the_prediction_is_null(ranks: Ranks, tmp_path: Path) -> None:
    figures = ranks.run([1.0, 1.0])[0]["step_seconds"]
    assert figures["predicted"] is figures["error"] is figures["hardware"] is None
    assert figures["measured"]["seconds"] == pytest.approx(1.01)  # a save of 5 s every 500 steps
    assert list(tmp_path.iterdir()) == []


def test_an_error_above_a_tenth_ends_the_advice(ranks: Ranks, hardware: Path) -> None:
    grades.check(hardware, MACHINE, *KIND)  # nothing was graded yet
    ranks.config.checkpoint.every = 0
    ranks.prediction = prediction(hardware, 1.09)
    ranks.run([1.0, 1.0])
    grades.check(hardware, MACHINE, *KIND)
    ranks.prediction = prediction(hardware, 1.12)
    ranks.run([1.0, 1.0])
    with pytest.raises(HvdlmError, match=r"machine\.yaml.*runs/default.* 12\.0% too high.*plan --measure"):
        grades.check(hardware, MACHINE, *KIND)
    grades.check(hardware, MACHINE, "tensorflow", "fp32")
    ranks.prediction = prediction(hardware, 0.8)
    ranks.run([1.0, 1.0])
    with pytest.raises(HvdlmError, match=r"20\.0% too low"):
        grades.check(hardware, MACHINE, *KIND)


def test_an_error_counts_until_its_kind_is_measured_anew(ranks: Ranks, hardware: Path) -> None:
    ranks.prediction = prediction(hardware, 9.0)
    ranks.run([1.0, 1.0])
    other = replace(MACHINE, rates=(RATES, replace(RATES, framework="tensorflow")))
    assert grades.last_error(hardware, other, *KIND) is not None
    assert grades.last_error(hardware, measured_anew(), *KIND) is None


def test_errors_of_foreign_files_and_short_runs_are_not_kept(ranks: Ranks, tmp_path: Path) -> None:
    ranks.prediction = prediction(None, 9.0)
    assert ranks.run([1.0, 1.0])[0]["step_seconds"]["error"] == pytest.approx(9.0 / 1.01 - 1)
    assert list(tmp_path.iterdir()) == []
    steps = MeasuredSteps()
    add_steps(steps, [1.0] * 5)
    figures = grading.compare([steps.by_cause(0)], {"seconds": {"seconds": 9.0}, "hardware": "x"}, steps)
    assert figures["error"] is None and figures["predicted"] == {"seconds": 9.0}


def test_many_runs_that_end_at_once_leave_one_whole_error(hardware: Path) -> None:
    measurements = grades.checksum(MACHINE, *KIND)

    def end(number: int) -> None:
        figures = {"error": number / 100, "padding": "x" * 5000}
        grades.write(error_file(hardware), measurements, figures, f"runs/{number}")

    threads = [threading.Thread(target=end, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    error, run = grades.last_error(hardware, MACHINE, *KIND) or (-1.0, "")
    assert run == f"runs/{round(100 * error)}"
    assert list(hardware.parent.iterdir()) == [error_file(hardware)]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"error": "x"}', '{"measurements": 1, "error": 1, "run": ""}'])
def test_a_damaged_error_file_is_as_good_as_none(hardware: Path, content: str) -> None:
    error_file(hardware).write_text(content)
    assert grades.last_error(hardware, MACHINE, *KIND) is None


def test_the_last_line_has_both_by_cause(hardware: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"seconds": 1.5, "compute": 1.2, "communication": 0.25, "bubble": 0.0, "data": 0.05, "save": 0.0}
    predicted = {"seconds": 1.35, "compute": 1.1, "communication": 0.2, "bubble": 0.0, "data": 0.05, "save": 0.0}
    figures = {"measured": measured, "predicted": predicted, "error": -0.1, "hardware": "test machine"}
    for world_rank in (0, 1):
        plugin = StepSecondsLine()
        plugin.hvdlm_run_started(SimpleNamespace(rank=world_rank))
        plugin.hvdlm_run_ended({"step_seconds": figures})
        plugin.hvdlm_run_ended({"step_seconds": {**figures, "predicted": None}})
        plugin.hvdlm_run_ended({})
    assert capsys.readouterr().out == (
        "a step took 1.5 s (predicted 1.35 s, 10.0% too low): compute 1.2 s (1.1 s), communication 250 ms (200 ms), "
        "bubble 0 ms (0 ms), data 50 ms (50 ms), save 0 ms (0 ms); by test machine\n"
    )


@both_frameworks
def test_a_run_is_graded_by_the_measurements_of_its_machine(framework: str, tmp_path: Path) -> None:
    rates = replace(RATES, framework=framework, seconds_per_step=30.0)
    measured = replace(MACHINE, rates=(rates,), measured={"a rank": "now"}, save_bytes_per_second=1e6)
    (tmp_path / "hvdlm").mkdir()
    hardware, run, report = tmp_path / "hvdlm" / "hardware.yaml", tmp_path / "run", tmp_path / "report.html"
    write_hardware(measured, hardware)
    options = ["--framework", framework, "--log.run", str(run), "--train.steps", "14", "--checkpoint.every", "5"]
    done = run_python(["-m", "hvdlm", *SMALL, *options], XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    figures = read_json(run / "summary.json")["step_seconds"]
    assert figures["hardware"] == "test machine" and figures["rank"] == 0 and figures["steps"] == 12
    assert figures["predicted"]["seconds"] > 30 > figures["measured"]["seconds"] > figures["measured"]["save"] > 0
    [line] = [line for line in done.stdout.splitlines() if line.startswith("a step took ")]
    assert "too high): compute" in line and done.stdout.index(line) > done.stdout.index("done: validation")
    error, graded = grades.last_error(hardware, read_hardware(hardware), framework, "fp32") or (0.0, "")
    assert error == figures["error"] > 1 and graded == str(run)
    assert cli.main(["report", str(run), "--output", str(report)]) == 0
    assert "Seconds a step" in report.read_text() and "too high" in report.read_text()


def test_a_damaged_hardware_file_is_refused_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "hvdlm").mkdir()
    hardware, run = tmp_path / "hvdlm" / "hardware.yaml", tmp_path / "run"
    hardware.write_text("rates: []")
    options = [*SMALL, "--train.steps", "2", "--log.run", str(run)]
    done = run_python(["-m", "hvdlm", *options], XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and "name is missing" in done.stderr
    assert read_json(run / "summary.json")["step_seconds"]["predicted"] is None
    named = ["--log.hardware", str(hardware), "--log.overwrite", "true"]
    done = run_python(["-m", "hvdlm", *options, *named])
    assert done.returncode == 2 and "name is missing" in done.stderr
