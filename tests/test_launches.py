"""Runs the tests on every rank of launches (tests/parallel), and those of one framework a process (tests/alone)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launching import launch, run_python

FRAMEWORKS = ["torch", "tensorflow"]
LAUNCHES = [("mpirun", 2), ("mpirun", 4), ("horovodrun", 2), ("horovodrun --gloo", 2)]
COMPILED = "--ignore-glob=*/test_compilation.py"
# The contracts of worlds and groups, which every launch runs. Threads of one process run all files of tests/parallel; a
# launch of processes runs others only where they are named here, without the cases that tests/parallel/conftest.py
# leaves to threads.
CONTRACTS = ("collectives", "compilation", "half_precision", "host_tensors", "messages", "sums", "through_host_memory")
CONTRACTS = " or ".join(f"test_{name}.py" for name in CONTRACTS)
# Every layout is trained by threads of one process; every transport trains a layout with stages, one with tensor ranks,
# one with context ranks, and on four ranks one with two axes and ZeRO.
SHARDED = "every_layout and (1x2x1 or 2x1x2-zero2) or one_step and (1x1x2 or 2x2x1-zero0) or evaluation_and_generation"
SHARDED += " or test_context.py or test_virtual_stages.py or test_gathered_layers.py"
# What an exchange computes from its collectives is the same on every transport: threads compare all of it with the
# papers' equations. Every transport (not every launcher: horovodrun's is that of mpirun) trains with exchanges, adds by
# Adasum, and has sums in flight over several steps, beside messages.
EXCHANGES = "losses_of_every_exchange or adasum or in_flight and none or sum_travels"
LEVELS = "test_two_level and (int8 or bytes or curve)"
LATER = "test_automatic or (test_muon or test_moving_average) and a_layout"
LATER += " or test_document_masks and (1x2x1 or exact)"
SELECTED = {
    ("mpirun", 2): ["-k", f"{CONTRACTS} or {EXCHANGES} or {SHARDED} or {LATER}"],
    ("mpirun", 4): ["-k", f"{CONTRACTS} or {SHARDED} or {LEVELS}"],
    ("horovodrun", 2): ["-k", CONTRACTS, COMPILED],
    ("horovodrun --gloo", 2): ["-k", f"{CONTRACTS} or {EXCHANGES} or {SHARDED}", COMPILED],
}
# TensorFlow traces every layout on every rank. Its operations of Horovod are the same over Gloo and MPI; PyTorch trains
# the layouts over both. Four processes have groups of two along two axes.
LESS_OF_TENSORFLOW = {
    ("mpirun", 4): ["-k", f"{CONTRACTS} or every_layout and 2x1x2-zero2 or test_context.py or {LEVELS}"],
    ("horovodrun --gloo", 2): ["-k", f"{CONTRACTS} or {EXCHANGES}", COMPILED],
}
# What needs processes: PyTorch's compiler; the features of Horovod's and mpi4py's transports.
ONLY_PROCESSES = [COMPILED, "--ignore-glob=*/test_through_host_memory.py", "--ignore-glob=*/test_host_tensors.py"]
# TensorFlow traces a step of every exchange for a second: two ranks of mpirun train with all of them, others with those
# that sum (in one round or two, 32 or 16 bits), gather or replace parameters, four with those that compress linearly.
FEW_EXCHANGES = {2: ["dense", "bf16", "random_k", "power_sgd", "top_k", "diloco", "streaming_diloco", "zero with int8"]}
FEW_EXCHANGES |= {4: ["dense", "random_k", "power_sgd", "top_k"]}
COVERED_ON_TWO = "two processes for all exchanges, and the equations of four ranks"
if "HVDLM_TEST_FULL" not in os.environ:  # each kind of collective once: a sum, a gather, two rounds, overlapping sums
    FEW_EXCHANGES[2] = ["dense", "top_k", "power_sgd", "streaming_diloco", "zero with int8"]
LINEAR = ["dense", "random_k", "power_sgd", "fp16", "bf16"]  # to compare four ranks with two
# Without the plugin that collects garbage five times at the end, which takes a rank a second, to report exceptions in
# finalizers.
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


@pytest.fixture(scope="module")
def output_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder to which launches write their curves (tests/parallel/test_compression.py)."""
    return tmp_path_factory.mktemp("launches")


def variables_of(framework: str, ranks: int, backend: str) -> dict[str, str]:
    """Return the environment variables of a launch that runs tests of this folder.

    Without the plugins of other packages, whose imports take half of a rank's time until its first test.
    """
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": str(ranks), "HVDLM_TEST_BACKEND": backend}
    return tests | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def assert_tests_pass(
    launcher: str, ranks: int, framework: str, backend: str, arguments: list[str], folder: Path, **variables: str
) -> None:
    """Run tests on every rank of a launch, which writes the curves NAME-RANKS-FRAMEWORK.npz."""
    name = f"{backend or launcher.replace(' ', '')}-{ranks}"
    tests = variables_of(framework, ranks, backend)
    tests["HVDLM_TEST_OUTPUT"] = str(folder / f"{name}-{framework}.npz")
    if framework == "tensorflow" and name != "mpirun-2":
        tests["HVDLM_TEST_EXCHANGES"] = ",".join(FEW_EXCHANGES[ranks])
    elif ranks == 4 and "HVDLM_TEST_FULL" not in os.environ:
        tests["HVDLM_TEST_EXCHANGES"] = ",".join([*LINEAR, "top_k"])
    processes = 1 if backend == "threads" else ranks
    command = [*PYTEST, "tests/parallel", *arguments]
    done = launch(launcher, processes, command, timeout=1800, **tests, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == processes, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("launcher, ranks", LAUNCHES)
def test_parallel_tests_pass_on_every_rank(launcher: str, ranks: int, framework: str, output_folder: Path) -> None:
    selected = SELECTED[launcher, ranks]
    if framework == "tensorflow" and "HVDLM_TEST_FULL" not in os.environ:
        selected = LESS_OF_TENSORFLOW.get((launcher, ranks), selected)
    assert_tests_pass(launcher, ranks, framework, "", selected, output_folder)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parallel_tests_pass_in_threads_of_one_process(ranks: int, framework: str, output_folder: Path) -> None:
    # Of the process; the tests use TensorFlow before its ranks start.
    assert_tests_pass("mpirun", ranks, framework, "threads", ONLY_PROCESSES, output_folder, TF_NUM_INTEROP_THREADS="8")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parallel_tests_pass_without_horovod(framework: str, output_folder: Path) -> None:
    """Backend mpi4py, with the features that it alone has (tests/parallel/test_host_tensors.py)."""
    assert_tests_pass(
        "mpirun", 2, framework, "mpi4py", ["-k", f"{CONTRACTS} or {EXCHANGES} or {SHARDED}"], output_folder
    )


@pytest.mark.parametrize(
    "launcher, backend, framework",
    [("mpirun", "mpi", "torch"), ("mpirun", "mpi4py", "tensorflow"), ("horovodrun --gloo", "gloo", "torch")],
)
def test_half_precision_is_summed_on_three_ranks(launcher: str, backend: str, framework: str) -> None:
    """A number of ranks for which transports have other algorithms than for powers of two."""
    tests = variables_of(framework, 3, backend)
    done = launch(launcher, 3, [*PYTEST, "tests/parallel/test_half_precision.py"], **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count("6 passed") == 3, done.stdout[-3000:]


def in_full(*case: Any) -> Any:
    """Return a case of a ring that ``make test`` leaves out."""
    return pytest.param(*case, marks=pytest.mark.full(covered_by="PyTorch's rings: adding contains no framework"))


@pytest.mark.parametrize(
    "backend, framework, ranks, coding",
    [
        ("mpi", "torch", 3, "1"),
        ("mpi", "torch", 2, "0"),
        in_full("mpi", "tensorflow", 4, "1"),
        ("mpi4py", "torch", 4, ""),
        in_full("mpi4py", "tensorflow", 3, ""),
    ],
)
def test_sums_go_around_a_ring(backend: str, framework: str, ranks: int, coding: str) -> None:
    """As between hosts: all sums, of groups too, and those of 16-bit floats, with and without coded exponents."""
    tests = variables_of(framework, ranks, backend)
    tests["HOROVOD_RING_THRESHOLD"] = "1"
    files = [f"tests/parallel/test_{name}.py" for name in ("sums", "half_precision", "collectives")]
    done = launch("mpirun", ranks, [*PYTEST, *files], **tests, **({"HOROVOD_RING_CODING": coding} if coding else {}))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == ranks, done.stdout[-3000:]


IN_THREADS = pytest.param("threads", "tensorflow", marks=pytest.mark.full(covered_by="PyTorch in threads, and mpi4py"))


@pytest.mark.parametrize(
    "transport, framework", [("mpi4py", "torch"), ("mpi4py", "tensorflow"), ("threads", "torch"), IN_THREADS]
)
def test_every_exchange_has_the_same_curve_without_horovod(transport: str, framework: str, output_folder: Path) -> None:
    without, horovod = (curves(output_folder, f"{name}-2-{framework}") for name in (transport, "mpirun"))
    fewest = 14 if framework == "torch" else len(FEW_EXCHANGES[2])
    assert horovod.keys() >= without.keys() and len(horovod) >= 14 and len(without) >= fewest
    for name, curve in without.items():
        assert curve == pytest.approx(horovod[name], abs=1e-6), name


def curves(output_folder: Path, name: str, kind: str = "losses") -> dict[str, np.ndarray]:
    """Return every variant's losses ``[steps]`` or parameters ``[steps, elements]`` of one launch."""
    path = output_folder / f"{name}.npz"
    assert path.exists(), f"test_parallel_tests_pass_on_every_rank left no {path.name}"
    with np.load(path) as arrays:
        return {key.rpartition("/")[0]: arrays[key] for key in arrays.files if key.endswith(f"/{kind}")}


# Rounding to fewer bits amplifies rounding errors: a value on the border of two levels may be rounded either way.
ROUNDING = {"int8": 5e-5, "bf16": 5e-5, "fp16": 1e-5, "zero with int8": 5e-5}
# Of values within a rounding error of a threshold (zero; the k-th largest), the frameworks may select different ones.
CHOOSING = {
    "scaled_sign",
    "sign_majority",
    "qsgd",
    "int4",
    "top_k",
    "dgc",
    "diloco with top_k",
    "one_bit_adam",
    "zero_one_adam",
}
CHOOSING |= {"zero with top_k", "demo", "streaming_diloco with int4", "chunked_top_k", "local_sgd with chunked_top_k"}
# The sign of a rounding error is a direction of DeMo, where no gradient is: rows of tokens that don't occur.
MOST_DIFFERENT = {"demo": 40}
DIFFERENT = 2e-5  # for parameters around 0.2: rounding causes differences of 2e-6, one sign of 3e-3


@pytest.mark.parametrize(
    "launch",
    ["mpirun-2", "horovodrun--gloo-2", pytest.param("threads-4", marks=pytest.mark.full(covered_by=COVERED_ON_TWO))],
)
def test_frameworks_train_alike_under_every_exchange(output_folder: Path, launch: str) -> None:
    fewest = 14 if launch == "mpirun-2" else len(FEW_EXCHANGES[int(launch[-1])])
    assert_train_alike(output_folder, *(f"{launch}-{framework}" for framework in FRAMEWORKS), fewest=fewest)


def assert_train_alike(folder: Path, *names: str, fewest: int = 14) -> None:
    """Check that two launches of tests/parallel/test_compression.py have the same curves under every exchange.

    The second one may have trained with fewer of them.
    """
    first, second = (curves(folder, name) for name in names)
    parameters = [curves(folder, name, "parameters") for name in names]
    assert len(first) >= 14 and len(second) >= fewest
    for name in second:
        curve = first[name]
        outliers = (np.abs(parameters[0][name] - parameters[1][name]) > DIFFERENT).sum(1)
        equal_steps = len(curve)
        if name in CHOOSING and outliers.any():
            # Until the first different selection nothing may differ; it has to be of few elements, and cost little.
            equal_steps = int(np.argmax(outliers > 0)) + 1
            assert outliers[equal_steps - 1] <= MOST_DIFFERENT.get(name, 4), (name, outliers)
            assert curve == pytest.approx(second[name], abs=1e-3), name
        elif name not in ROUNDING:
            assert not outliers.any(), (name, outliers)
        tolerance = ROUNDING.get(name, 1e-6)
        assert curve[:equal_steps] == pytest.approx(second[name][:equal_steps], abs=tolerance), name


@pytest.mark.parametrize(
    "framework", ["torch", pytest.param("tensorflow", marks=pytest.mark.full(covered_by=COVERED_ON_TWO))]
)
def test_four_ranks_train_like_two_where_compression_is_linear(output_folder: Path, framework: str) -> None:
    """random_k and PowerSGD compress the sum of all ranks; casts only round it."""
    two, four = (curves(output_folder, f"threads-{ranks}-{framework}") for ranks in (2, 4))
    tolerances = {"dense": 1e-6, "random_k": 1e-6, "power_sgd": 1e-6}
    if framework == "torch":
        tolerances |= {"fp16": 1e-4, "bf16": 5e-3}
    for name, tolerance in tolerances.items():
        assert two[name] == pytest.approx(four[name], abs=tolerance), name
    assert two["top_k"] != pytest.approx(four["top_k"], abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compressors_have_their_documented_properties(framework: str) -> None:
    done = run_python([*PYTEST, "tests/alone"], HVDLM_TEST_FRAMEWORK=framework, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
