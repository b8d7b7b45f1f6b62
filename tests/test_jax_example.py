"""The framework of examples/plugins/jax, installed with pip: on the curves of torch, checkpoints in every direction."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_launches import PYTEST, assert_train_alike

from builders import case
from launching import ONE_LAYER, ROOT, SMALL, install_example, launch, losses, metrics, run_command, run_python

SOURCE = ROOT / "examples" / "plugins" / "jax"
STEPS = 32
# Micro-batches of the rows that one of 2 ranks has, and 64 validation rows in batches of 32: what one rank compiles
# serves two, too.
MODELS = {
    "gpt": ("--model.name", "gpt", "--train.micro_batch_size", "4", "--log.sample_tokens", "20")
    + ("--data.validation_share", "0.0044"),
    "lstm": ("--model.name", "lstm", "--train.micro_batch_size", "4", "--data.sampling", "sequential")
    + ("--train.optimizer", "sgd", "--train.momentum", "0.9", "--train.learning_rate", "0.3")
    + ("--train.label_smoothing", "0.1", "--data.context", "8", "--data.validation_share", "0.0011"),
}
# Most time of these tests is that of compilation, whose results processes share. Curves are those of optimized code.
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
# What depends on the framework of the tests that run on every rank (tests/parallel), and of those of one rank.
ON_EVERY_RANK = "test_collectives or test_host_tensors or losses_of or adapters or (every_layout and 2x1x1)"
ON_ONE_RANK = "(same_updates and (gpt or lstm)) or (clipping and jax) or (beyond and llama)"

RUNS = """
import json, sys
import hvdlm
from hvdlm.configuration.parsing import parse_config

for options in json.loads(sys.argv[1]):
    hvdlm.train(parse_config(options))
"""
MOVES = """
import json, sys
import hvdlm

for run in json.loads(sys.argv[1]):
    for framework, steps in (("jax", 23), ("tensorflow", 26), ("jax", 29), ("torch", 32)):
        moved = {"framework": framework, "log.run": run, "checkpoint.resume": "auto", "train.steps": steps}
        result = hvdlm.train(hvdlm.Config.load(f"{run}/config.yaml", moved))
        assert (result.summary["framework"], result.steps) == (framework, steps)
"""


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
    return os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of torch, named by their models."""
    return train("torch", tmp_path_factory.mktemp("torch"), os.environ.get("PYTHONPATH", ""))


@pytest.fixture(scope="module")
def jax_runs(jax_path: str, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return {ranks: a folder with runs of JAX}; two ranks have resumed a run of torch, too."""
    folders = {ranks: tmp_path_factory.mktemp(f"jax{ranks}") for ranks in (1, 2)}
    train("jax", folders[1], jax_path)
    copy_until(runs / "gpt", 20, folders[2] / "resumed")
    train("jax", folders[2], jax_path, ranks=2, resumed="resumed/gpt")
    return folders


def train(framework: str, folder: Path, path: str, ranks: int = 1, resumed: str = "") -> Path:
    """Train all models, and resume one, in one process per rank; return the folder of runs named by their models."""
    common = ["--framework", framework, *SMALL, *ONE_LAYER, "--train.schedule", "constant"]
    common += ["--train.steps", str(STEPS), "--train.eval_batch_size", "32"]
    common += ["--checkpoint.every", "20", "--checkpoint.keep", "9", "--log.tensorboard", "false", "--log.run"]
    commands = [[*options, *common, str(folder / model)] for model, options in MODELS.items()]
    if resumed:
        again = ["--checkpoint.resume", "auto"]
        commands += [[*MODELS[Path(resumed).name], *again, *common, str(folder / resumed)]]
    # The framework is named for tests/warm.
    done = launch("mpirun", ranks, ["-c", RUNS, json.dumps(commands), "--framework", framework], PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", list(MODELS))
def test_jax_is_on_the_curve_of_torch(jax_runs: dict[int, Path], runs: Path, model: str, ranks: int) -> None:
    run = jax_runs[ranks] / model
    curve, expected = losses(run), losses(runs / model)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["framework"], summary["backend"]) == ("jax", "local" if ranks == 1 else "mpi4py")
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.3
    assert curve == pytest.approx(expected, abs=1e-5)
    validation = [metrics(one)[-1]["val_loss"] for one in (run, runs / model)]
    assert validation[0] == pytest.approx(validation[1], abs=1e-5)
    if model == "gpt":  # tokens are drawn from the same scores
        assert (run / "sample.txt").read_text() == (runs / model / "sample.txt").read_text()


def copy_until(run: Path, step: int, folder: Path) -> Path:
    """Return a copy of a run in which the checkpoint of ``step`` is the newest."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


def test_a_checkpoint_moves_between_all_frameworks(jax_path: str, runs: Path, tmp_path: Path) -> None:
    """From torch to JAX to TensorFlow to JAX to torch, in one process, which is started once."""
    copies = [copy_until(runs / model, 20, tmp_path) for model in MODELS]
    command = ["-c", MOVES, json.dumps([str(copy) for copy in copies]), "--framework", "tensorflow"]
    done = run_python(command, PYTHONPATH=jax_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for copy in copies:
        expected, curve = losses(runs / copy.name)[20:], losses(copy)[-12:]
        assert len(expected) == 12 and curve == pytest.approx(expected, abs=1e-5), copy.name


def test_two_ranks_of_jax_resume_from_one_of_torch(jax_runs: dict[int, Path], runs: Path) -> None:
    run = jax_runs[2] / "resumed" / "gpt"
    curve = losses(run)
    assert json.loads((run / "summary.json").read_text())["framework"] == "jax"
    assert curve[-12:] == pytest.approx(losses(runs / "gpt")[-12:], abs=1e-5)


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
    done = run_python(command, HVDLM_TEST_FRAMEWORKS="torch jax", PYTHONPATH=jax_path, **QUICKLY, **every)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_example_passes_its_own_tests_and_conforms(jax_path: str, tmp_path: Path) -> None:
    chosen = "test_hvdlm_jax.py or not same_losses and not torch and not tensorflow"  # tests of their own compare these
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(SOURCE / "tests")]
    done = run_python([*command, "--hvdlm-plugin", "jax", "-k", chosen], cwd=tmp_path, PYTHONPATH=jax_path, **QUICKLY)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) > 30, done.stdout[-3000:]  # -k still names them
