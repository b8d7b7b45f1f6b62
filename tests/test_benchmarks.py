"""Every benchmark runs in its short form and prints its figures; their values aren't judged."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from builders import case
from launching import DATA, ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data is not at {DATA} (set HVDLM_DATA)")


# Script, its options in the test beside --short, and how many figures it prints then.
RUNS = [
    ("all_reduce_cost", ["torch"], 2),
    ("all_reduce_cost", ["tensorflow"], 2),
    ("auto", ["torch"], 1),
    ("communication_cost", ["torch"], 2),
    ("compiled_steps", ["torch"], 2),
    pytest.param("cpu_speed", ["--data", str(DATA)], 3, marks=needs_data),
    ("exact_sums", ["torch"], 4),
    case("exact_sums", ["tensorflow"], 4, covered_by="the case of torch; sums of TensorFlow: test_exact.py"),
    ("fuzz", ["yaml"], 1),
    ("fuzz", ["digits"], 1),  # without a dictionary
    ("dense_sums", ["torch"], 3),
    ("generation", ["torch"], 2),
    case("loop_overhead", ["torch"], 1, covered_by="communication_cost measures the same beside the same plain loop"),
    ("loop_overhead", ["tensorflow"], 1),
    pytest.param("losses", ["--data", str(DATA)], 2, marks=needs_data),
    pytest.param("optimizers", ["--data", str(DATA)], 3, marks=needs_data),
    ("parallel", ["torch"], 3),
    ("planner", ["torch"], 2),
    ("planner_search", ["torch"], 1),
    pytest.param("prefetching", ["torch", "--data", str(DATA)], 2, marks=needs_data),
    ("published_figures", [], 18),
    ("replica_check", ["torch"], 2),
    case(
        "replica_check",
        ["tensorflow"],
        2,
        covered_by="the case of torch; TensorFlow's replicas: test_published_state.py",
    ),
    ("simulator", [], 7),
    ("slow_network", ["torch"], 3),
    ("start", ["torch"], 1),
    ("streaming", ["torch"], 3),
    ("tensor_overlap", ["torch"], 1),
    ("tensorflow_chunks", [], 2),
    ("two_levels", ["torch"], 2),
    ("waiting_threads", ["torch"], 4),
    ("without_horovod", ["torch"], 1),
    case(
        "without_horovod", ["tensorflow"], 1, covered_by="the case of torch; TensorFlow's ranks: test_mpi4py_backend.py"
    ),
]
# Scripts whose short forms are run by other tests, modules of benchmarks, and the scripts that their ranks run.
ELSEWHERE = {
    "chaos",  # tests/test_chaos.py
    "gpu",  # tests/test_gpu_kit.py
    "results",  # tests/test_results.py
    "save_cost",  # test_run_all_ends_with_a_summary
}
HELPERS = {
    "branches",
    "damage",
    "gpu_build",
    "gpu_cases",
    "gpu_launch",
    "gpu_results",
    "harness",
    "hosts",
    "loss_rows",
    "interruptions",
    "launcher_signals",
    "two_runs",
    "plain_gpt",
    "gpt_on_ranks",
    "planner_configurations",
    "plain_torch",
    "plain_tensorflow",
    "published_foundry",
    "published_horovod",
    "published_systems",
}
WORKERS = {
    "auto_worker",
    "damage_worker",
    "ddp_worker",
    "fuzz_worker",
    "gpu_speed_worker",
    "gpu_worker",
    "layout_worker",
    "nanogpt_worker",
    "paired_worker",
    "planner_worker",
    "prefetching_worker",
    "steady_worker",
    "waiting_worker",
}


def run(script: str, *options: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a benchmark whose processes are warm, but for those that change or time what is imported."""
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    imports = "" if script in ("fuzz", "start") else imported(script, options)
    env = environment(HVDLM_TEST_IMPORTS=imports)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def imported(script: str, options: Sequence[str]) -> str:
    """Return the framework that the processes of a benchmark import where they don't name one."""
    if script in ("published_figures", "simulator"):
        return "none"
    return "tensorflow" if script == "tensorflow_chunks" or "tensorflow" in options else "torch"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of measurements of this machine, which the benchmarks of the planner share."""
    return tmp_path_factory.mktemp("planner")


@pytest.mark.parametrize(("script", "options", "count"), RUNS)
def test_the_short_form_prints_its_figures(
    script: str, options: list[str], count: int, machine: Path, tmp_path: Path
) -> None:
    folders = {
        "fuzz": tmp_path,
        "losses": tmp_path,
        "optimizers": tmp_path,
        "planner": machine,
        "planner_search": machine,
    }
    folder = ["--folder", str(folders[script])] if script in folders else []
    done = run(script, *options, "--short", *folder)
    if done.returncode == harness.SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = harness.figures(done.stdout)
    assert len(figures) == count, done.stdout
    assert all(math.isfinite(float(figure.value)) for figure in figures)


def test_no_script_is_left_out() -> None:
    scripts = {path.stem for path in harness.FOLDER.glob("*.py")}
    tested = {run.values[0] if hasattr(run, "values") else run[0] for run in RUNS}
    assert scripts == tested | ELSEWHERE | HELPERS | WORKERS | {"run_all"}


def test_run_all_ends_with_a_summary() -> None:
    done = run("run_all", "save_cost", "--short")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = harness.figures(done.stdout)
    assert len(figures) == 4 and all(math.isfinite(float(figure.value)) for figure in figures)
    assert "| bytes written / bytes of the state, 2,359,296 parameters, 2 rank(s) | 1 | 1 to 1 |" in done.stdout
    assert "of 4 bars reached, 0 benchmark(s) skipped" in done.stdout.splitlines()[-1]


def test_run_all_names_what_failed_to_run(tmp_path: Path) -> None:
    """The worker's programs are not found: one benchmark fails, the summary says so."""
    command = [sys.executable, "benchmarks/run_all.py", "all_reduce_cost", "--short"]
    env = environment(PATH=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed to run: all_reduce_cost"


def test_a_worker_that_cannot_start_ends_the_benchmark() -> None:
    done = run("waiting_threads", "torch", "--width", "30", "--settings", "default")
    assert done.returncode == 1 and "--verbose shows its messages" in done.stderr, done.stdout + done.stderr


def test_figures_are_read_as_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    bars = harness.Bar(at_most=1.02), harness.Bar(at_least=0.95), harness.Bar(0.85, 1.15)
    assert [bar.reached(1.0) for bar in bars] == [True, True, True]
    assert [bar.reached(1.3) for bar in bars] == [False, True, False]
    assert not any(bar.reached(math.nan) for bar in bars)
    assert harness.report_ratio("a: b / c", [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)], bars[0], "more")
    assert not harness.report("d", 0.5, bars[1])
    assert harness.report("e", 12.3456, None)
    first, second, third = harness.figures("noise\n" + capsys.readouterr().out)
    assert (first.title, first.value, first.bar, first.reached) == ("a: b / c", "1", "<= 1.02", True)
    assert first.details.startswith("quartiles 0.500 to 1.500 of 3 rounds; medians 2 and 2; more; load ")
    assert (second.title, second.bar, second.reached) == ("d", ">= 0.95", False)
    assert (third.value, third.bar, third.reached) == ("12.35", "", None)


def test_the_short_form_replaces_sizes_that_were_not_given() -> None:
    full, short = {"rounds": 40, "ranks": [1, 4], "width": 128}, {"rounds": 2, "ranks": [1]}

    def sizes(*arguments: str) -> tuple[int, list[int], int]:
        o = harness.parse(harness.make_parser(None, frameworks=False), full, short, arguments)
        return o.rounds, o.ranks, o.width

    assert sizes() == (40, [1, 4], 128)
    assert sizes("--short") == (2, [1], 128)
    assert sizes("--short", "--rounds", "7", "--ranks", "2", "3") == (7, [2, 3], 128)
