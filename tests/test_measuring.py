"""plan --measure: fits of rates to steps, the machine's hardware file, and real measurements of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import CompressorRate, Hardware, Link, MeasuredCollective, Rates, read_hardware
from hvdlm.planning.step_time import predict_time
from hvdlm_backends.local import LocalWorld
from hvdlm_planner import fitting, measure, measured_file, timed_record, timed_steps
from hvdlm_planner.calibrations import ALONE, config_of, layouts_of
from hvdlm_planner.layout_fit import fit_layouts
from hvdlm_planner.measure import rates_of
from hvdlm_planner.measured_file import Measurement
from hvdlm_planner.timed_record import Timed
from launching import run_python

CONSTANTS = [5e-12, 8e-11, 3e-11, 2e-10, 2e-9, 1e-5, 2e-4, 4e-4, 1e-9]  # of fitting.KINDS
LINKS = {"node": Link(5e-5, 1e9), "network": Link(1e-4, 1e8)}


def base() -> Config:
    config = Config()
    config.train.precision = "fp32"
    return config


def spec_of(config: Config, vocab: int):
    manager = plugins.load([config.model.name])
    return plugins.find_model(manager, config.model.name)(config.model, vocab, config.data.context)


def machine(rates: Rates, **others) -> Hardware:
    return Hardware("a machine", "nothing", "nothing", (rates,), LINKS, **others)


def measured_tables(ranks: int) -> tuple[MeasuredCollective, ...]:
    sizes, names = (64.0, 65536.0, 1048576.0), ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
    return tuple(MeasuredCollective(name, ranks, sizes, (1e-4, 2e-4, 1e-3)) for name in names)


def timed(config: Config, vocab: int, hardware: Hardware, ranks: int) -> timed_steps.TimedModel:
    """Return a model whose steps take what is predicted on ``hardware``."""
    parallel = config.parallel
    mesh = Mesh(ranks // parallel.pipeline // parallel.tensor, parallel.pipeline, parallel.tensor)
    spec = spec_of(config, vocab)
    predicted = predict_time(config, spec, mesh, hardware)
    assert predicted is not None
    return timed_steps.TimedModel(config, spec, mesh, None, [], 1, seconds=[predicted.seconds] * 3)


def test_a_fit_finds_the_constants_that_made_the_seconds() -> None:
    works = [work_of(config := config_of(base(), one), spec_of(config, one.vocab), Mesh(1, 1, 1), 0) for one in ALONE]
    system = np.array([fitting.amounts(work) for work in works if work is not None])
    fitted = fitting.fit(system.tolist(), (system @ CONSTANTS).tolist())
    assert fitted == pytest.approx(CONSTANTS, rel=1e-3)
    assert max(map(abs, fitting.errors(system.tolist(), fitted, (system @ CONSTANTS).tolist()))) < 1e-6


def test_no_fitted_constant_is_negative() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        system, seconds = generator.random((8, 5)), generator.random(8) + 0.1
        assert min(fitting.fit(system.tolist(), seconds.tolist())) >= 0


def test_predicted_seconds_are_amounts_times_constants() -> None:
    """What is fitted is what the planner computes with."""
    hardware = machine(rates_of(CONSTANTS, "torch", "fp32", 1))
    for one in ALONE:
        config = config_of(base(), one)
        config.checkpoint.every = 0
        work = work_of(config, spec_of(config, one.vocab), Mesh(1, 1, 1), 0)
        predicted = predict_time(config, spec_of(config, one.vocab), Mesh(1, 1, 1), hardware)
        assert work is not None and predicted is not None
        assert predicted.seconds == pytest.approx(float(np.dot(fitting.amounts(work), CONSTANTS)), rel=1e-9)


def test_layouts_show_what_communication_costs() -> None:
    """From steps predicted on a machine, its constants are found again, to the grid of the search."""
    rates = rates_of(CONSTANTS, "torch", "fp32", 2)
    compressors = {
        "int8": CompressorRate(3e-8),
        "power_sgd": CompressorRate(2e-8),
        "outer_update": CompressorRate(6e-9),
    }
    true = replace(rates, overlap_slowdown=1.5, blocking_seconds=3e-4, compressors=compressors)
    true = replace(true, seconds_per_gathered_element=4e-9, seconds_per_scattered_element=2e-9)
    hardware = machine(true, collectives=measured_tables(2), ranks_per_node=2)
    layouts = [Timed(kind, timed(config, vocab, hardware, 2)) for kind, config, vocab in layouts_of(base(), 2)]
    fitted, tables = fit_layouts(layouts, replace(hardware, rates=(rates,)), rates)
    again = replace(hardware, rates=(fitted,), collectives=tables)
    for layout in layouts:
        model = layout.model
        predicted = predict_time(model.config, model.spec, model.mesh, again)
        assert predicted is not None and predicted.seconds == pytest.approx(model.seconds[0], rel=0.03), layout.kind


def test_timed_steps_are_kept_as_they_are(tmp_path: Path) -> None:
    """What is read back is what was written, and a fit to it, too."""
    hardware = machine(rates_of(CONSTANTS, "torch", "fp32", 2), collectives=measured_tables(2), ranks_per_node=2)
    planned = [(timed_record.ALONE, config_of(base(), one), one.vocab) for one in ALONE]
    alone = [Timed(kind, timed(config, vocab, hardware, 1)) for kind, config, vocab in planned]
    together = [Timed(kind, timed(config, vocab, hardware, 2)) for kind, config, vocab in layouts_of(base(), 2)]
    record = timed_record.Record("torch", 2, 2, list(hardware.collectives), [*alone, *together], 1e9)
    timed_record.write(record, path := tmp_path / "steps.json")
    again = timed_record.read(path)
    assert (again.framework, again.ranks, again.link, again.save_bytes_per_second) == ("torch", 2, "node", 1e9)
    assert tuple(again.collectives) == hardware.collectives
    for one, other in zip(record.models, again.models, strict=True):
        assert (one.kind, one.model.mesh, one.model.seconds) == (other.kind, other.model.mesh, other.model.seconds)
        assert one.model.config == other.model.config and one.model.spec.parameters == other.model.spec.parameters
    measure.fit_again(path, tmp_path / "hardware.yaml")
    fitted = read_hardware(tmp_path / "hardware.yaml")
    for model in (one.model for one in record.models):
        predicted = predict_time(model.config, model.spec, model.mesh, fitted)
        assert predicted is not None and predicted.seconds == pytest.approx(model.seconds[0], rel=0.05)
    path.write_text("{}")
    with pytest.raises(HvdlmError, match=r"steps\.json is no record of timed steps"):
        timed_record.read(path)


def test_turns_are_steadied_by_the_speed_of_their_round() -> None:
    models = [timed(config_of(base(), one), one.vocab, machine(Rates(1e11, 1e10)), 1) for one in ALONE[:3]]
    usual = [model.seconds[0] for model in models]
    for model in models:
        model.seconds = [model.seconds[0] * speed for speed in (1.0, 3.0, 1.0, 0.5, 1.0)]
    timed_steps.steady(models)
    assert [model.seconds for model in models] == [pytest.approx([seconds] * 5) for seconds in usual]


def test_most_rounds_beside_other_work_count_as_the_quiet_ones() -> None:
    """Another program had a core for two thirds of the time of a measurement."""
    models = [timed(config_of(base(), one), one.vocab, machine(Rates(1e11, 1e10)), 1) for one in ALONE[:3]]
    quiet = [model.seconds[0] for model in models]
    for model in models:
        model.seconds = [model.seconds[0] * speed for speed in (1.0, 1.6, 1.7, 1.6, 1.0, 1.6, 1.6, 1.01, 1.6)]
    timed_steps.steady(models)
    assert [model.seconds for model in models] == [pytest.approx([seconds] * 9) for seconds in quiet]


def test_turns_are_the_medians_of_the_ranks() -> None:
    """The slowest rank counts for models that each rank trains by itself; steps that all make take all equally long."""
    hardware = machine(Rates(1e11, 1e10))
    models = [timed(config_of(base(), one), one.vocab, hardware, 1) for one in ALONE[:2]]
    models.append(timed(config_of(base(), ALONE[0]), ALONE[0].vocab, hardware, 2))
    # Ranks share cores: each is slow in one of three turns. The last rank is slower by a tenth in all of them.
    shares = [[1.5, 1.0, 1.0], [1.0, 1.5, 1.0], [1.0, 1.0, 1.5], [1.1, 1.1, 1.1]]
    of_ranks = [[[2.0 * s for s in share], [4.0 * s for s in share], [3.0, 3.0, 3.0]] for share in shares]
    timed_steps.of_all_ranks(models, SimpleNamespace(gather_objects=lambda own: of_ranks))  # type: ignore[arg-type]
    slower = 1.1 / 1.1**0.25
    assert models[0].seconds == pytest.approx([2.0 * slower * 1.05] * 3)
    assert models[1].seconds == pytest.approx([4.0 * slower * 1.05] * 3)
    assert models[2].seconds == [3.0, 3.0, 3.0]


def test_a_measurement_replaces_its_own_kind_only(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"

    def measurement(framework: str, ranks: int, seconds: float) -> Measurement:
        rates = Rates(1e11, seconds, framework=framework, precision="fp32", ranks=ranks)
        pair = MeasuredCollective("broadcast", 2, (64.0, 1e6), (1e-5, seconds), "node", framework, ranks)
        tables = [pair] if ranks > 1 else []
        return Measurement(rates, tables, ranks, "node", 1e9, {f"{framework}, {ranks} rank(s)": f"{seconds}"})

    for new in (measurement("torch", 1, 1.0), measurement("torch", 2, 2.0), measurement("tensorflow", 2, 3.0)):
        measured_file.add(new, path)
    measured_file.add(measurement("torch", 2, 4.0), path)
    hardware = read_hardware(path)
    kinds = {(rates.framework, rates.ranks): rates.memory_bytes_per_second for rates in hardware.rates}
    assert kinds == {("torch", 1): 1.0, ("torch", 2): 4.0, ("tensorflow", 2): 3.0}
    assert sorted(table.seconds[-1] for table in hardware.collectives) == [3.0, 4.0]
    assert hardware.ranks_per_node == 2 and hardware.measured["torch, 2 rank(s)"] == "4.0"
    # A pair among four ranks is another kind than a pair that has the node for itself.
    hardware = measured_file.add(measurement("torch", 4, 5.0), path)
    assert sorted(table.seconds[-1] for table in hardware.collectives) == [3.0, 4.0, 5.0]
    assert hardware.links["node"].bytes_per_second == pytest.approx(1e6 / 3.0, rel=1e-3)


def test_ranks_measure_themselves_and_plan_uses_it(tmp_path: Path) -> None:
    """One rank of TensorFlow, to the file of this user; benchmarks/planner.py measures two of PyTorch."""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    options = ["--framework", "tensorflow", "--model.layers", "2", "--model.width", "64"]
    before = run_python(["-m", "hvdlm", "plan", *options], **cache)
    assert before.returncode == 0, before.stderr
    steps = ["--steps", str(tmp_path / "steps.json")]
    arguments = [
        "-m",
        "hvdlm",
        "plan",
        "--measure",
        "--seconds",
        "100",
        "--rounds",
        "1",
        "--models",
        "10",
        *steps,
        *options,
    ]
    done = run_python(arguments, timeout=120, **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    [rates] = read_hardware(tmp_path / "hvdlm" / "hardware.yaml").rates
    measure.fit_again(tmp_path / "steps.json", tmp_path / "again.yaml")
    assert read_hardware(tmp_path / "again.yaml").rates == (rates,)
    assert (rates.framework, rates.precision, rates.ranks) == ("tensorflow", "fp32", 1)
    after = run_python(["-m", "hvdlm", "plan", *options], **cache)
    assert "step" in after.stdout and len(after.stdout) > len(before.stdout), after.stdout + after.stderr


def test_a_measurement_that_has_no_time_is_refused() -> None:
    done = run_python(["-m", "hvdlm", "plan", "--measure", "--seconds", "1"])
    assert done.returncode == 2 and "can't be measured in so few seconds: of 13 small models, only 0" in done.stderr


class Clock(measure.Progress):
    """A second passes whenever it is looked at."""

    def __init__(self, seconds: float) -> None:
        super().__init__(LocalWorld(), 0.0)
        self.seconds = seconds

    def left(self) -> float:
        self.seconds -= 1.0
        return self.seconds


def test_what_there_is_no_time_for_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The last models of the list, and the turns of a round that not all have."""
    ranks = timed_steps.Ranks(LocalWorld(), SimpleNamespace(name="torch"), 1, ())  # type: ignore[arg-type]
    made = iter(range(1000))
    monkeypatch.setattr(
        measure,
        "build",
        lambda *_: SimpleNamespace(
            number=next(made), seconds=[], steps=1, turn_seconds=0.16, mesh=Mesh(1, 1, 1), run=lambda periods: 1.0
        ),
    )
    monkeypatch.setattr(measure, "warm_up", lambda *_: None)
    models: list[Any] = [timed.model for timed in measure._built(ranks, base(), Clock(34.0), most=100)]
    assert [model.number for model in models] == list(range(12))
    assert "12 models are built, 1 are left out" in capsys.readouterr().out
    with pytest.raises(HvdlmError, match=r"of 13 small models, only 4 could be started, and 10 are needed"):
        measure._built(ranks, base(), Clock(12.0), most=100)
    assert len(measure._built(ranks, base(), Clock(100.0), most=11)) == 11
    assert len(measure._built(ranks, base(), Clock(100.0), most=1)) == 10, "fewer determine no figure"
    monkeypatch.setattr(measure, "_standard_error", lambda models: 1.0)
    measure._take_turns(models[:3], LocalWorld(), Clock(12.0), most=100)
    assert [model.seconds for model in models[:3]] == [[1.0, 1.0]] * 3
    with pytest.raises(HvdlmError, match="before every model has had its turn"):
        measure._take_turns(models[:3], LocalWorld(), Clock(3.0), most=100)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("seconds", "got 0, expected more than 0"),
        *((name, "got 0, expected at least 1") for name in ("rounds", "models")),
    ],
)
def test_a_measurement_needs_time_and_models(option: str, sentence: str) -> None:
    done = run_python(["-m", "hvdlm", "plan", "--measure", f"--{option}", "0"])
    assert done.returncode == 2 and f"--{option}: {sentence}" in done.stderr
