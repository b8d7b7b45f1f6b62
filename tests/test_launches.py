"""Runs the tests on every rank of launches (tests/parallel), and those of one framework a process (tests/alone)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launching import launch, run_python

FRAMEWORKS = ["torch", "tensorflow"]
LAUNCHES = [("mpirun", 2), ("mpirun", 4), ("horovodrun", 2), ("horovodrun --gloo", 2)]
COMPILED, COMPRESSION = "--ignore-glob=*/test_compilation.py", "--ignore-glob=*/test_compression.py"
# Every layout is trained by threads of one process; every transport trains a layout with stages, one with tensor ranks,
# and on four ranks one with both axes and ZeRO.
SHARDED = "every_layout and (1x2x1 or 2x1x2-zero2) or one_step and (1x1x2 or 2x2x1-zero0) or evaluation_and_generation"
FEW_LAYOUTS = ["-k", f"not test_layouts and not test_update_equations or {SHARDED}"]
NO_LAYOUTS = ["-k", "not test_layouts and not test_update_equations"]
# Exchanges depend on the transport, not on the launcher, and horovodrun's is that of mpirun.
SELECTED = {
    ("mpirun", 2): FEW_LAYOUTS,
    ("mpirun", 4): [*FEW_LAYOUTS, COMPRESSION],
    ("horovodrun", 2): [*NO_LAYOUTS, COMPRESSION, COMPILED],
    ("horovodrun --gloo", 2): [*FEW_LAYOUTS, COMPILED],
}
# What needs processes: PyTorch's compiler; the features of Horovod's and mpi4py's transports.
ONLY_PROCESSES = [COMPILED, "--ignore-glob=*/test_through_host_memory.py", "--ignore-glob=*/test_host_tensors.py"]
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]


@pytest.fixture(scope="module")
def output_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder to which launches write their curves (tests/parallel/test_compression.py)."""
    return tmp_path_factory.mktemp("launches")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("launcher, ranks", LAUNCHES)
def test_parallel_tests_pass_on_every_rank(launcher: str, ranks: int, framework: str, output_folder: Path) -> None:
    output = output_folder / f"{launcher.replace(' ', '')}-{ranks}-{framework}.npz"
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": str(ranks), "HVDLM_TEST_OUTPUT": str(output)}
    arguments = [*PYTEST, "tests/parallel", *SELECTED[launcher, ranks]]
    done = launch(launcher, ranks, arguments, timeout=1800, **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == ranks, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parallel_tests_pass_in_threads_of_one_process(ranks: int, framework: str, output_folder: Path) -> None:
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": str(ranks), "HVDLM_TEST_BACKEND": "threads"}
    # Of the process; the tests use TensorFlow before its ranks start.
    tests |= {
        "TF_NUM_INTEROP_THREADS": "8",
        "HVDLM_TEST_OUTPUT": str(output_folder / f"threads-{ranks}-{framework}.npz"),
    }
    arguments = [*PYTEST, "tests/parallel", *ONLY_PROCESSES]
    done = run_python(arguments, timeout=1800, **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == 1, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parallel_tests_pass_without_horovod(framework: str, output_folder: Path) -> None:
    """Backend mpi4py, with the features that it alone has (tests/parallel/test_host_tensors.py)."""
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": "2", "HVDLM_TEST_BACKEND": "mpi4py"}
    output = output_folder / f"mpi4py-2-{framework}.npz"
    done = launch(
        "mpirun",
        2,
        [*PYTEST, "tests/parallel", *FEW_LAYOUTS],
        timeout=1800,
        HVDLM_TEST_OUTPUT=str(output),
        **tests,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == 2, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("launcher, backend", [("mpirun", "mpi"), ("mpirun", "mpi4py"), ("horovodrun --gloo", "gloo")])
def test_half_precision_is_summed_on_three_ranks(launcher: str, backend: str, framework: str) -> None:
    """A number of ranks for which transports have other algorithms than for powers of two."""
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": "3", "HVDLM_TEST_BACKEND": backend}
    done = launch(launcher, 3, [*PYTEST, "tests/parallel/test_half_precision.py"], **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count("6 passed") == 3, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("transport", ["mpi4py", "threads"])
def test_every_exchange_has_the_same_curve_without_horovod(transport: str, framework: str, output_folder: Path) -> None:
    without, horovod = (curves(output_folder, f"{name}-2-{framework}") for name in (transport, "mpirun"))
    assert without.keys() == horovod.keys() and len(without) >= 14
    for name, curve in without.items():
        assert curve == pytest.approx(horovod[name], abs=1e-6), name


def curves(output_folder: Path, name: str, kind: str = "losses") -> dict[str, np.ndarray]:
    """Return every variant's losses ``[steps]`` or parameters ``[steps, elements]`` of one launch."""
    path = output_folder / f"{name}.npz"
    assert path.exists(), f"test_parallel_tests_pass_on_every_rank left no {path.name}"
    with np.load(path) as arrays:
        return {key.rpartition("/")[0]: arrays[key] for key in arrays.files if key.endswith(f"/{kind}")}


# Rounding to fewer bits amplifies rounding errors: a value on the border of two levels may be rounded either way.
ROUNDING = {"int8": 5e-5, "bf16": 5e-5, "fp16": 1e-5}
# Of values within a rounding error of a threshold (zero; the k-th largest), the frameworks may select different ones.
CHOOSING = {"scaled_sign", "sign_majority", "qsgd", "top_k", "dgc", "diloco with top_k"}
DIFFERENT = 2e-5  # for parameters around 0.2: rounding causes differences of 2e-6, one sign of 3e-3


@pytest.mark.parametrize("launch", ["mpirun-2", "threads-4", "horovodrun--gloo-2"])
def test_frameworks_train_alike_under_every_exchange(output_folder: Path, launch: str) -> None:
    assert_train_alike(output_folder, *(f"{launch}-{framework}" for framework in FRAMEWORKS))


def assert_train_alike(folder: Path, *names: str) -> None:
    """Check that two launches of tests/parallel/test_compression.py have the same curves under every exchange."""
    first, second = (curves(folder, name) for name in names)
    parameters = [curves(folder, name, "parameters") for name in names]
    assert first.keys() == second.keys() and len(first) >= 14
    for name, curve in first.items():
        outliers = (np.abs(parameters[0][name] - parameters[1][name]) > DIFFERENT).sum(1)
        equal_steps = len(curve)
        if name in CHOOSING and outliers.any():
            # Until the first different selection nothing may differ; it has to be of few elements, and cost little.
            equal_steps = int(np.argmax(outliers > 0)) + 1
            assert outliers[equal_steps - 1] <= 4, (name, outliers)
            assert curve == pytest.approx(second[name], abs=1e-3), name
        elif name not in ROUNDING:
            assert not outliers.any(), (name, outliers)
        tolerance = ROUNDING.get(name, 1e-6)
        assert curve[:equal_steps] == pytest.approx(second[name][:equal_steps], abs=tolerance), name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_four_ranks_train_like_two_where_compression_is_linear(output_folder: Path, framework: str) -> None:
    """random_k and PowerSGD compress the sum of all ranks; casts only round it."""
    two, four = (curves(output_folder, f"threads-{ranks}-{framework}") for ranks in (2, 4))
    for name, tolerance in (("dense", 1e-6), ("random_k", 1e-6), ("power_sgd", 1e-6), ("fp16", 1e-4), ("bf16", 5e-3)):
        assert two[name] == pytest.approx(four[name], abs=tolerance), name
    assert two["top_k"] != pytest.approx(four["top_k"], abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compressors_have_their_documented_properties(framework: str) -> None:
    done = run_python([*PYTEST, "tests/alone"], HVDLM_TEST_FRAMEWORK=framework, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
