"""plan --search: the layouts it lists are valid, fit, and are the fastest by the prediction."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from builders import configured_spec, meshes, small_config
from hvdlm import cli, plugins
from hvdlm.config import Config, ModelConfig
from hvdlm.configuration import validation
from hvdlm.configuration.parsing import parse_config
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.planning.gradient_work import work_of
from hvdlm.planning.hardware import Hardware, read_hardware, write_hardware
from hvdlm.planning.layout_costs import LayoutCosts
from hvdlm.planning.search import Layout, Space, make_space, search, value_of, with_options
from hvdlm.planning.search import meshes as search_meshes
from hvdlm.planning.search_reasons import gains, too_large
from hvdlm.planning.step_time import machine_of, predict_time, step_time
from hvdlm_planner import grades
from hvdlm_planner.given_options import given_options
from hvdlm_planner.layouts import layout_costs
from hvdlm_planner.measured_file import measured_path
from launching import run_python


class InventedCosts:
    """Costs drawn at random by the layout's options, with a lower bound that is right."""

    def __init__(self, seed: int, memory: float = 0.6) -> None:
        self.seed = seed
        self.memory = memory
        self.times = 0

    def _draw(self, purpose: str, *values: Any) -> float:
        return random.Random(f"{self.seed} {purpose} {values}").random()

    def _layout(self, config: Config, mesh: Mesh) -> tuple[Any, ...]:
        p, train = config.parallel, config.train  # one rank alone has nothing to shard
        return (*mesh.shape, p.sequence, p.zero if mesh.data > 1 else 0, train.micro_batch_size)

    def valid(self, config: Config, mesh: Mesh) -> bool:
        zero, sequence = config.parallel.zero if mesh.data > 1 else 0, config.parallel.sequence
        lossy = config.communication.exchange != "all_reduce"
        drawn = self._draw("valid", *self._layout(config, mesh)) < 0.8
        return drawn and not (zero and lossy) and (mesh.tensor > 1 or not sequence)

    def fit(self, config: Config, mesh: Mesh) -> Any:
        needed = self._draw("fit", *self._layout(config, mesh))
        return SimpleNamespace(fits=needed <= self.memory, needed=needed)

    def bound(self, config: Config, mesh: Mesh) -> float:
        return self._draw("bound", *mesh.shape, config.train.micro_batch_size)

    def time(self, config: Config, mesh: Mesh) -> Any:
        self.times += 1
        compute, c = self.bound(config, mesh), config.communication
        exchanged = (c.exchange, c.bucket_bytes) if mesh.data > 1 else ()
        communication = self._draw(
            "time", *self._layout(config, mesh), config.train.activation_checkpointing, *exchanged
        )
        return SimpleNamespace(seconds=compute + communication, compute=compute, communication=communication)


def all_layouts(config: Config, space: Space, costs: InventedCosts) -> list[tuple[float, Mesh]]:
    """Return the seconds and the mesh of every layout that is valid and fits, by trying all of them."""
    seconds = []
    sizes = range(1, space.ranks + 1)
    for data, pipeline, tensor in ((d, p, t) for d in sizes for p in sizes for t in sizes):
        mesh = Mesh(data, pipeline, tensor)
        if mesh.size != space.ranks or config.train.batch_size % data or pipeline > config.model.layers:
            continue
        rows = config.train.batch_size // data
        for micro in (None, *(n for n in range(1, rows) if rows % n == 0)):
            for sequence in (False, True) if tensor > 1 else (False,):
                for zero in range(4 if pipeline == 1 else 3) if data > 1 else (0,):
                    for recompute in (False, True):
                        for bucket in space.choices["communication.bucket_bytes"][
                            : None if data > 1 and zero < 3 else 1
                        ]:
                            options = {
                                "parallel.data": data,
                                "parallel.pipeline": pipeline,
                                "parallel.tensor": tensor,
                                "parallel.sequence": sequence,
                                "parallel.zero": zero,
                                "train.activation_checkpointing": recompute,
                                "train.micro_batch_size": micro,
                                "communication.bucket_bytes": bucket,
                            }
                            candidate = with_options(config, options)
                            # As the search does: whether a layout is valid takes longest to check.
                            fits = costs.fit(candidate, mesh).fits
                            time = costs.time(candidate, mesh).seconds if fits else math.inf
                            if fits and costs.valid(candidate, mesh):
                                seconds.append((time, mesh))
    return sorted(seconds, key=lambda entry: entry[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_what_trying_all_layouts_finds(seed: int) -> None:
    config = small_config("torch")
    ranks = (1, 2, 4, 6, 8)[seed % 5]
    space, costs = make_space(config, configured_spec(config), ranks), InventedCosts(seed)
    expected = all_layouts(config, space, costs)
    tried, costs.times = costs.times, 0
    layouts = search(config, space, costs, count=3)
    best_of_meshes: dict[Mesh, float] = {}
    for seconds, mesh in expected:
        best_of_meshes.setdefault(mesh, seconds)
    assert [(layout.time.seconds, layout.mesh) for layout in layouts] == [
        (seconds, mesh) for mesh, seconds in list(best_of_meshes.items())[:3]
    ]
    assert costs.times <= tried


@pytest.mark.parametrize("seed", range(4))
def test_fewer_options_are_never_better(seed: int) -> None:
    config = small_config("torch")
    space, costs = make_space(config, configured_spec(config), 8), InventedCosts(seed)
    best = search(config, space, costs)[0]
    for option, values in space.choices.items():
        for value in values:
            restricted = search(config, space.only(option, value), costs)
            assert all(layout.time.seconds >= best.time.seconds for layout in restricted)
            assert all(layout.options[option] == value for layout in restricted)


def test_equal_layouts_are_listed_in_a_fixed_order() -> None:
    config = small_config("torch")
    costs = InventedCosts(0, memory=1.0)
    costs._draw = lambda purpose, *values: 0.5  # type: ignore[method-assign]
    layouts = search(config, make_space(config, configured_spec(config), 4), costs)
    assert layouts[0].mesh == Mesh(4, 1, 1)  # the plainest of equal ones
    assert value_of(layouts[0].config, "communication.bucket_bytes") == config.communication.bucket_bytes
    assert layouts[0].config.train.micro_batch_size is None and not layouts[0].config.parallel.zero


def test_options_that_the_user_gave_stay() -> None:
    config = small_config("torch")
    config.parallel.tensor, config.parallel.data, config.train.micro_batch_size = 2, 2, 1
    fixed = {"parallel.tensor", "parallel.data", "train.micro_batch_size", "parallel.zero"}
    space = make_space(config, configured_spec(config), 8, fixed)
    layouts = search(config, space, InventedCosts(1, memory=1.0))
    assert [layout.mesh for layout in layouts] == [Mesh(2, 2, 2)]
    assert layouts[0].config.train.micro_batch_size == 1 and layouts[0].config.parallel.zero == 0


def test_layouts_are_those_of_sums_in_two_levels() -> None:
    config = small_config("torch")
    config.parallel.data_per_node = 2
    matches = list(search_meshes(make_space(config, configured_spec(config), 4)))
    assert matches and all(mesh.data_per_node == 2 and mesh.data % 2 == 0 for mesh in matches)


def test_lossy_exchanges_are_searched_where_asked_for() -> None:
    config = small_config("torch")
    spec = configured_spec(config)
    assert make_space(config, spec, 4).choices["communication.exchange"] == ["all_reduce"]
    space = make_space(config, spec, 4, (), {"communication.exchange": ["diloco"]})
    assert space.choices["communication.exchange"] == ["all_reduce", "diloco"]


def test_gains_compare_with_the_best_layout_without_an_option() -> None:
    config = small_config("torch")
    space, costs = make_space(config, configured_spec(config), 8), InventedCosts(3)
    best: Layout = search(config, space, costs)[0]
    compared = gains(config, space, costs, best)
    differing = {name for name, value in best.options.items() if value != value_of(config, name)}
    assert {gain.option for gain in compared} == differing - {"parallel.data"}
    for gain in compared:
        assert gain.without is None or gain.without.time.seconds >= best.time.seconds
    largest = too_large(config, space, costs, best)
    assert largest is None or (not largest.fit.fits and largest.time.seconds < best.time.seconds)


def costs_of(config: Config, hardware: Hardware | None = None, memory: float | None = None) -> LayoutCosts:
    """Return the costs by which the command searches."""
    manager = plugins.load(["torch", config.model.name, "compression", "diloco"])
    return layout_costs(manager, config, hardware or read_hardware("h100"), memory)


@pytest.fixture(scope="module")
def config() -> Config:
    """Return a model that neither data, pipeline nor tensor ranks alone are best for."""
    config = Config()
    config.model = ModelConfig(name="llama", layers=5, width=1024, heads=16, vocab=32000, tie_embeddings=True)
    config.data.context, config.train.batch_size, config.train.precision = 512, 16, "bf16"
    return config


def real_layouts(config: Config, space: Space, costs: LayoutCosts) -> list[tuple[float, Config]]:
    """Return the seconds of all valid layouts that fit, each predicted by itself."""
    choices = space.choices
    layouts = []
    for mesh in meshes(space.ranks):
        rows = config.train.batch_size // mesh.data
        for micro in (None, *(n for n in range(1, rows) if rows % n == 0)):
            for zero in range(4 if mesh.pipeline == 1 else 3):
                for sequence, recompute, bucket in (
                    (s, r, b)
                    for s in choices["parallel.sequence"]
                    for r in choices["train.activation_checkpointing"]
                    for b in choices["communication.bucket_bytes"]
                ):
                    parallel = replace(config.parallel, data=mesh.data, pipeline=mesh.pipeline, tensor=mesh.tensor)
                    candidate = replace(
                        config,
                        parallel=replace(parallel, sequence=sequence, zero=zero),
                        train=replace(config.train, micro_batch_size=micro, activation_checkpointing=recompute),
                        communication=replace(config.communication, bucket_bytes=bucket),
                    )
                    if costs.valid(candidate, mesh) and costs._fit(candidate, mesh).fits:
                        layouts.append((costs._time(candidate, mesh).seconds, candidate))
    return layouts


@pytest.mark.parametrize(("ranks", "memory"), [(4, 80e9), (4, 2.4e9), (2, 2.6e9), (1, 80e9)])
def test_the_first_layout_is_the_fastest_predicted_one(config: Config, ranks: int, memory: float) -> None:
    costs = costs_of(config, memory=memory)
    space = make_space(config, costs.spec, ranks)
    space = replace(space, choices={**space.choices, "communication.bucket_bytes": [4_000_000, 64_000_000]})
    tried = real_layouts(config, space, costs)
    assert tried
    best = search(config, space, costs)[0]
    assert best.time.seconds == min(seconds for seconds, _ in tried)
    assert any(candidate == replace(best.config) for _, candidate in tried)


def test_every_result_starts_and_fits(config: Config) -> None:
    costs = costs_of(config, memory=2.4e9)
    config = replace(config, communication=replace(config.communication))
    lossy = {"communication.exchange": ["diloco"], "communication.compression.algorithm": ["int8", "power_sgd"]}
    for layout in search(config, make_space(config, costs.spec, 8, (), lossy), costs):
        assert make_mesh(8, layout.config.parallel) == layout.mesh
        validation.values(layout.config)
        validation.layout(layout.config, layout.mesh)
        validation.model(layout.config, costs.manager)
        assert layout.fit.fits and layout.fit.needed <= 2.4e9
        time = predict_time(layout.config, costs.spec, layout.mesh, costs.hardware, costs.moments, costs.habits)
        assert time == layout.time


def machines() -> dict[str, Hardware]:
    """Return the H100, one of which ranks share cores and collectives slow computation down, and one as measured."""
    h100 = read_hardware("h100")
    shared = replace(h100, cores_per_node=2, ranks_per_node=8, overlap_slowdown=1.5)
    measured = {"bubble_factor": 0.4, "pass_seconds": 1e-4, "collective_slowdown": 1.5}
    rates = tuple(replace(rates, **measured) for rates in h100.rates)  # type: ignore[arg-type]
    return {"h100": h100, "shared": shared, "measured": replace(shared, rates=rates)}


PAIRED = pytest.mark.full(covered_by="this machine with the other schedule, and this schedule on other machines")


@pytest.mark.parametrize(
    "schedule, machine",
    [
        ("1f1b", "h100"),
        ("1f1b", "measured"),
        ("gpipe", "shared"),
        pytest.param("gpipe", "h100", marks=PAIRED),
        pytest.param("gpipe", "measured", marks=PAIRED),
        pytest.param("1f1b", "shared", marks=PAIRED),
    ],
)
def test_no_layout_is_faster_than_its_lower_bound(config: Config, machine: str, schedule: str) -> None:
    config = replace(config, parallel=replace(config.parallel, schedule=schedule))
    costs = costs_of(config, machines()[machine])
    space = make_space(config, costs.spec, 4)
    for seconds, candidate in real_layouts(config, space, costs):
        p = candidate.parallel
        assert costs._bound(candidate, Mesh(p.data or 1, p.pipeline, p.tensor)) <= seconds


@pytest.mark.parametrize("machine", ["h100", "shared", "measured"])
def test_virtual_stages_are_not_faster_than_their_lower_bound(config: Config, machine: str) -> None:
    model = replace(config.model, layers=8, vocab=1000)  # stages of about the same seconds
    costs, seconds = costs_of(replace(config, model=model), machines()[machine]), {}
    for pipeline, virtual, size in itertools.product((2, 4), (1, 2), (1, 2)):
        mesh = Mesh(1, pipeline, 1)
        parallel = replace(config.parallel, data=1, pipeline=pipeline, virtual_stages=virtual)
        train = replace(config.train, batch_size=16, micro_batch_size=size)
        candidate = replace(config, model=model, parallel=parallel, train=train)
        assert costs.valid(candidate, mesh)
        seconds[pipeline, virtual, size] = time = costs.time(candidate, mesh)
        assert costs._bound(candidate, mesh) <= time.seconds
    bubbles = [(seconds[p, 2, n].bubble, seconds[p, 1, n].bubble) for p, n in itertools.product((2, 4), (1, 2))]
    assert all(virtual < plain or virtual == plain == 0.0 for virtual, plain in bubbles)
    assert machine == "shared" or any(plain > 0.0 for _, plain in bubbles)  # there, ranks that wait leave their cores


@pytest.mark.parametrize("shape", [(2, 5, 1), (1, 3, 2), (2, 2, 2), (4, 1, 2)])
def test_equal_stages_share_their_work_without_a_difference(config: Config, shape: tuple[int, int, int]) -> None:
    mesh, hardware = Mesh(*shape), read_hardware("h100")
    config = replace(config, parallel=replace(config.parallel, data=shape[0], pipeline=shape[1], tensor=shape[2]))
    config = replace(config, train=replace(config.train, micro_batch_size=2, compile=False))
    spec = costs_of(config).spec
    works = [work_of(config, spec, mesh, stage * mesh.tensor) for stage in range(mesh.pipeline)]
    each = step_time([work for work in works if work], config.parallel.schedule, *machine_of(config, mesh, hardware))
    together = predict_time(config, spec, mesh, hardware)
    assert together is not None and replace(together, data=0.0) == replace(each, data=0.0)


# The command

MODEL = ["--model.name", "llama", "--model.layers", "4", "--model.width", "256", "--model.heads", "4"]
MODEL += ["--model.vocab", "1000", "--train.batch_size", "16", "--data.context", "64"]
SEARCH = ["plan", "--search", "--hardware", "h100", *MODEL]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit code of a command, and what it printed."""
    code = cli.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_best_layout_is_written_as_yaml_to_start_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, given = tmp_path / "best.yaml", tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump({"parallel": {"tensor": 2}, "train": {"micro_batch_size": 2}}))
    arguments = ["--config", str(given), *MODEL]
    search_arguments = ["plan", "--search", "--ranks", "8", "--hardware", "h100", "--output", str(output)]
    code, text = run(capsys, *search_arguments, *arguments, "--parallel.zero=1")
    assert code == 0 and "the fastest layout of each mesh" in text and "H100" in text
    best = yaml.safe_load(output.read_text())
    assert set(best) <= {"parallel", "train", "communication"} and output.read_text().startswith("# 8 ranks as ")
    assert not {"tensor", "zero"} & set(best["parallel"]) and "micro_batch_size" not in best.get("train", {})
    config = parse_config([*arguments, "--parallel.zero=1", "--config", str(output)])
    mesh = make_mesh(8, config.parallel)
    validation.layout(config, mesh)
    assert mesh.tensor == 2 and config.train.micro_batch_size == 2 and config.parallel.zero == 1
    assert run(capsys, *search_arguments, *arguments, "--parallel.zero=1") == (code, text)  # in the same order


def test_the_best_layout_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "best.yaml"
    assert run(capsys, *SEARCH, "--ranks", "1", "--output", str(output))[0] == 0
    options = ["--train.steps", "1", "--log.run", str(tmp_path / "run"), "--data.tokenizer", "byte"]
    done = run_python(["-m", "hvdlm", *MODEL, *options, "--config", str(output)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "0"], "needs the number of ranks"),
        ([], "needs the number of ranks"),
        (["--ranks", "8", "--gpu_memory", "1MB"], "no layout for 8 ranks fits into 1 MB: the smallest, "),
        (["--ranks", "7"], "no layout for 7 ranks: train.batch_size 16 can't be split over 7 data ranks"),
        (["--ranks", "7", "--parallel.tensor", "7"], "model.heads 4 can't be split over parallel.tensor 7"),
        (["--ranks", "8", "--parallel.data", "3"], "no layout for 8 ranks: "),
        (["--ranks", "8", "--output", "/"], "--output"),
        (["--ranks", "8", "--hardware", "none"], "there is no hardware file"),
    ],
)
def test_wrong_searches_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    code, text = run(capsys, *SEARCH, *arguments)
    assert code == 2 and sentence in text, text


def test_searching_needs_measurements(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVDLM_HARDWARE", str(tmp_path / "hardware.yaml"))
    code, text = run(capsys, "plan", "--search", "--ranks", "2", *MODEL)
    assert code == 2 and "was not measured: python -m hvdlm plan --measure, or name hardware" in text


def test_wrong_measurements_give_memory_but_no_advice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVDLM_HARDWARE", str(tmp_path / "hardware.yaml"))
    h100 = read_hardware("h100")
    rates = replace(h100.rates[0], framework="torch", precision="fp32")
    hardware = replace(h100, rates=(rates,), device="cpu", measured={"torch, 1 rank(s)": "now"})
    write_hardware(hardware, measured_path())
    code, text = run(capsys, "plan", *MODEL)
    assert code == 0 and "seconds of a step" in text and "not predicted" not in text
    path = grades.path_of(measured_path(), "torch", "fp32")
    grades.write(path, grades.checksum(read_hardware(measured_path()), "torch", "fp32"), {"error": 0.11}, "runs/one")
    code, text = run(capsys, "plan", *MODEL)
    assert code == 0 and "memory of a rank" in text and "bytes of a rank's step" in text
    assert "not predicted: " in text and "runs/one, torch in fp32) were predicted 11.0% too high" in text
    code, text = run(capsys, "plan", "--search", "--ranks", "2", *MODEL)
    assert code == 2 and "measure this machine anew (python -m hvdlm plan --measure)" in text
    assert run(capsys, *SEARCH, "--ranks", "2")[0] == 0  # figures that were not measured here


def test_given_options_are_those_of_files_and_arguments(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {zero: 1}\ntrain.steps: 5\n")
    names = given_options(["--config", str(path), "--parallel.tensor=2", "--train.batch_size", "8", "--unknown", "1"])
    assert names == {"parallel.zero", "train.steps", "parallel.tensor", "train.batch_size"}


def test_lossy_searches_say_that_they_change_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, *SEARCH, "--ranks", "4", "--lossy")
    assert code == 0 and "change the result of training" in text
    assert "change the result" not in run(capsys, *SEARCH, "--ranks", "4")[1]
