"""The framework of examples/plugins/jax, installed with pip: on the curves of torch, checkpoints in every direction."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_launches import PYTEST, assert_train_alike

from builders import case
from launching import (
    ONE_LAYER,
    ROOT,
    SMALL,
    install_example,
    launch,
    losses,
    metrics,
    run_command,
    run_python,
    start_warm_jax,
)

SOURCE = ROOT / "examples" / "plugins" / "jax"
STEPS = 32
# Micro-batches of the rows that one of 2 ranks has, and 64 validation rows in batches of 32: what one rank compiles
# serves two, too.
MODELS = {
    "gpt": ("--model.name", "gpt", "--train.micro_batch_size", "4", "--log.sample_tokens", "20")
    + ("--data.validation_share", "0.0044"),
    "lstm": ("--model.name", "lstm", "--train.micro_batch_size", "4", "--data.sampling", "sequential")
    + ("--train.optimizer", "sgd", "--train.momentum", "0.9", "--train.learning_rate", "0.3")
    + (
        "--train.label_smoothing",
        "0.1",
        "--train.z_loss",
        "0.01",
        "--data.context",
        "8",
        "--data.validation_share",
        "0.0011",
    ),
}
# Most time of these tests is that of compilation, whose results processes share. Curves are those of optimized code.
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
# What depends on the framework of the tests that run on every rank (tests/parallel), and of those of one rank.
ON_EVERY_RANK = "test_collectives or test_host_tensors or losses_of or adapters or (every_layout and 2x1x1)"
ON_ONE_RANK = "(same_updates and (gpt or lstm or mistral or qwen3 or neox)) or (clipping and jax) or (beyond and llama)"

# Trains the runs of the first list, and continues those of the second in the framework that the command names.
RUNS = """
import json, sys
import hvdlm
from hvdlm.configuration.parsing import parse_config

for options in json.loads(sys.argv[1]):
    hvdlm.train(parse_config(options))
framework = sys.argv[-1]
for run, steps in json.loads(sys.argv[2]):
    moved = {"framework": framework, "log.run": run, "checkpoint.resume": "auto", "train.steps": steps}
    result = hvdlm.train(hvdlm.Config.load(f"{run}/config.yaml", moved))
    assert (result.summary["framework"], result.steps) == (framework, steps)
"""
MOVES = (("jax", 23), ("tensorflow", 26), ("jax", 29), ("torch", 32))
MOVED = [*MODELS] if "HVDLM_TEST_FULL" in os.environ else ["lstm"]  # which carries a state from step to step, too


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the processes of these tests share what XLA has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="module")
def jax_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return ``PYTHONPATH`` with the example, and with JAX from the package index where this Python lacks it."""
    folder = tmp_path_factory.mktemp("jax")
    installed = install_example("jax", folder)
    pinned = re.findall(r'"(jax\w*>=[^"]+)"', (SOURCE / "pyproject.toml").read_text())
    required = [*pinned, "opt_einsum", "scipy"]
    missing = [name for name in required if importlib.util.find_spec(name.partition(">")[0]) is None]
    if missing:
        # Without dependencies: numpy and ml_dtypes are those of this Python.
        # Not compiled: most of their modules are never imported.
        command = ["pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(installed), *missing]
        done = run_command([sys.executable, "-m", *command], timeout=240, PIP_ROOT_USER_ACTION="ignore")
        if done.returncode:
            pytest.skip(f"JAX can't be installed here: {done.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    start_warm_jax(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of torch, named by their models."""
    folder = tmp_path_factory.mktemp("torch")
    run("torch", [options_of(model, "torch", folder) for model in MODELS])
    return folder


@pytest.fixture(scope="module")
def moved_runs(jax_path: str, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of JAX on one rank, and in ``moved`` with runs of torch that have moved (``MOVES``)."""
    folder = tmp_path_factory.mktemp("jax1")
    copies = [str(copy_until(runs / model, 20, folder / "moved")) for model in MOVED]
    trained = [options_of(model, "jax", folder) for model in MODELS]
    for framework, steps in MOVES:
        run(framework, trained, [(copy, steps) for copy in copies], PYTHONPATH=jax_path)
        trained = []
    return folder


@pytest.fixture(scope="module")
def two_ranks(jax_path: str, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of JAX on two ranks: a whole one, and one that torch has begun."""
    folder = tmp_path_factory.mktemp("jax2")
    copy_until(runs / "gpt", 20, folder)
    trained = [options_of("lstm", "jax", folder), [*options_of("gpt", "jax", folder), "--checkpoint.resume", "auto"]]
    run("jax", trained, ranks=2, PYTHONPATH=jax_path)
    return folder


def options_of(model: str, framework: str, folder: Path) -> list[str]:
    """Return the options of a run in ``folder`` that has the name of its model."""
    options = ["--framework", framework, *SMALL, *ONE_LAYER, "--train.schedule", "constant"]
    options += ["--train.steps", str(STEPS), "--train.eval_batch_size", "32"]
    options += ["--checkpoint.every", "20", "--checkpoint.keep", "9", "--log.tensorboard", "false"]
    return [*MODELS[model], *options, "--log.run", str(folder / model)]


def run(
    framework: str, trained: list[list[str]], moved: Sequence[tuple[str, int]] = (), ranks: int = 1, **variables: str
) -> None:
    """Train runs with these options, and continue (run, steps), in one process per rank."""
    command = ["-c", RUNS, json.dumps(trained), json.dumps(moved), "--framework", framework]
    done = launch("mpirun", ranks, command, **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parametrize("model, ranks", [("gpt", 1), ("lstm", 1), ("lstm", 2)])
def test_jax_is_on_the_curve_of_torch(request: pytest.FixtureRequest, runs: Path, model: str, ranks: int) -> None:
    trained = request.getfixturevalue("moved_runs" if ranks == 1 else "two_ranks") / model
    curve, expected = losses(trained), losses(runs / model)
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["framework"], summary["backend"]) == ("jax", "local" if ranks == 1 else "mpi4py")
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.3
    assert curve == pytest.approx(expected, abs=1e-5)
    validation = [metrics(one)[-1]["val_loss"] for one in (trained, runs / model)]
    assert validation[0] == pytest.approx(validation[1], abs=1e-5)
    if model == "gpt":  # tokens are drawn from the same scores
        assert (trained / "sample.txt").read_text() == (runs / model / "sample.txt").read_text()


def copy_until(run: Path, step: int, folder: Path) -> Path:
    """Return a copy of a run in which the checkpoint of ``step`` is the newest."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


def test_a_checkpoint_moves_between_all_frameworks(moved_runs: Path, runs: Path) -> None:
    """From torch to JAX to TensorFlow to JAX to torch."""
    for model in MOVED:
        expected, curve = losses(runs / model)[20:], losses(moved_runs / "moved" / model)[-12:]
        assert len(expected) == 12 and curve == pytest.approx(expected, abs=1e-5), model


def test_two_ranks_of_jax_resume_from_one_of_torch(two_ranks: Path, runs: Path) -> None:
    summary = json.loads((two_ranks / "gpt" / "summary.json").read_text())
    assert (summary["framework"], summary["backend"]) == ("jax", "mpi4py")
    assert losses(two_ranks / "gpt")[-12:] == pytest.approx(losses(runs / "gpt")[-12:], abs=1e-5)


@pytest.mark.parametrize(
    ("chosen", "exchanges"),
    [
        (ON_EVERY_RANK, "dense,top_k,power_sgd,diloco"),
        case("losses_of", "", covered_by="the other case, for what JAX adds to an exchange; test_launches.py"),
    ],
    ids=["few", "all"],
)
def test_jax_passes_the_tests_of_every_rank(jax_path: str, tmp_path: Path, chosen: str, exchanges: str) -> None:
    """Collectives, ZeRO, adapters, and exchanges: compressors, local SGD and DiLoCo, on torch's curves."""
    for framework, backend, tests_of in (("jax", "mpi4py", chosen), ("torch", "threads", "losses_of")):
        tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": "2", "HVDLM_TEST_BACKEND": backend}
        tests |= {"HVDLM_TEST_OUTPUT": str(tmp_path / f"{framework}.npz"), "PYTHONPATH": jax_path}
        if framework == "jax":
            tests |= QUICKLY | ({"HVDLM_TEST_EXCHANGES": exchanges} if exchanges else {})
        command, processes = [*PYTEST, "tests/parallel", "-k", tests_of], 1 if backend == "threads" else 2
        done = launch("mpirun", processes, command, timeout=900, **tests)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        assert done.stdout.count(" passed") == processes and "skipped" not in done.stdout, done.stdout[-3000:]
    assert_train_alike(tmp_path, "torch", "jax", fewest=len(exchanges.split(",")) if exchanges else 14)


def test_jax_passes_the_tests_of_one_rank(jax_path: str) -> None:
    """Every update rule on torch's losses, clipping, generation beyond the context."""
    command = [*PYTEST, "tests/test_trainables.py", "-k", ON_ONE_RANK]
    every = {"HVDLM_TEST_FULL": "1"}  # what of two frameworks' tests covers others doesn't hold for a third one
    tests = {"HVDLM_TEST_FRAMEWORKS": "torch jax", "HVDLM_TEST_FRAMEWORK": "jax"}  # the latter for tests/warm
    done = run_python(command, PYTHONPATH=jax_path, **tests, **QUICKLY, **every)
    assert done.returncode == 0 and "11 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_example_passes_its_own_tests_and_conforms(jax_path: str, tmp_path: Path) -> None:
    left = "same_losses or torch or tensorflow"  # tests of this file compare these
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(SOURCE / "tests")]
    command += ["--hvdlm-plugin", "jax", "-k", f"test_hvdlm_jax.py or not ({left})"]
    done = run_python(command, cwd=tmp_path, PYTHONPATH=jax_path, HVDLM_TEST_FRAMEWORK="jax", **QUICKLY)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) > 30, done.stdout[-3000:]  # -k still names them
