"""Starts the tests that need a process of their own: those on every rank, and those of one framework alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launching import launch

FRAMEWORKS = ["torch", "tensorflow"]
LAUNCHES = [("mpirun", 2), ("mpirun", 4), ("horovodrun", 2), ("horovodrun --gloo", 2)]
LAYOUTS = ["--ignore-glob=*/test_layouts.py", "--ignore-glob=*/test_update_equations.py"]
# What ranks make of gradients depends on what moves the bytes, not on who starts the ranks, and horovodrun's are moved
# as mpirun's are; and TensorFlow traces layouts for long.
LESS = {
    ("horovodrun", "torch"): [*LAYOUTS, "--ignore-glob=*/test_compression.py"],
    ("horovodrun", "tensorflow"): [*LAYOUTS, "--ignore-glob=*/test_compression.py"],
    ("horovodrun --gloo", "tensorflow"): LAYOUTS,
}
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where launches leave their curves (tests/parallel/test_compression.py)."""
    return tmp_path_factory.mktemp("told")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("launcher, ranks", LAUNCHES)
def test_every_rank_passes(launcher: str, ranks: int, framework: str, told: Path) -> None:
    output = told / f"{launcher.replace(' ', '')}-{ranks}-{framework}.npz"
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": str(ranks), "HVDLM_TEST_OUTPUT": str(output)}
    arguments = [*PYTEST, "tests/parallel", *LESS.get((launcher, framework), [])]
    done = launch(launcher, ranks, arguments, timeout=1800, **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == ranks, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_rank_passes_without_horovod(framework: str, told: Path) -> None:
    """Backend mpi4py: what Horovod does, and what it doesn't (tests/parallel/test_host_tensors.py)."""
    tests = {"HVDLM_TEST_FRAMEWORK": framework, "HVDLM_TEST_RANKS": "2", "HVDLM_TEST_BACKEND": "mpi4py"}
    output = told / f"mpi4py-2-{framework}.npz"
    less = LAYOUTS if framework == "tensorflow" else []
    done = launch("mpirun", 2, [*PYTEST, "tests/parallel", *less], timeout=1800, HVDLM_TEST_OUTPUT=str(output), **tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == 2, done.stdout[-3000:]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_exchange_has_the_curve_of_mpi_without_horovod(framework: str, told: Path) -> None:
    without, horovod = (curves(told, f"{name}-2-{framework}") for name in ("mpi4py", "mpirun"))
    assert without.keys() == horovod.keys() and len(without) >= 14
    for name, curve in without.items():
        assert curve == pytest.approx(horovod[name], abs=1e-6), name


def curves(told: Path, name: str, what: str = "losses") -> dict[str, np.ndarray]:
    """Return each variant's losses ``[steps]`` or parameters ``[steps, elements]`` in one launch."""
    path = told / f"{name}.npz"
    assert path.exists(), f"test_every_rank_passes left no {path.name}"
    with np.load(path) as found:
        return {key.rpartition("/")[0]: found[key] for key in found.files if key.endswith(f"/{what}")}


# A value on the border of two levels falls to either side: rounding to fewer bits sees rounding errors grow.
ROUNDING = {"int8": 5e-5, "bf16": 5e-5, "fp16": 1e-5}
# A value within a rounding error of the border (zero; the k-th largest) is sent by one framework and not by the other.
CHOOSING = {"scaled_sign", "sign_majority", "qsgd", "top_k", "dgc", "diloco with top_k"}
PARTED = 2e-5  # of parameters around 0.2; rounding alone parts them by 2e-6, one sign by 3e-3


@pytest.mark.parametrize("launch", ["mpirun-2", "mpirun-4", "horovodrun--gloo-2"])
def test_frameworks_train_alike_under_every_exchange(told: Path, launch: str) -> None:
    names = [f"{launch}-{framework}" for framework in FRAMEWORKS]
    first, second = (curves(told, name) for name in names)
    parameters = [curves(told, name, "parameters") for name in names]
    assert len(first) >= 14
    for name, curve in first.items():
        astray = (np.abs(parameters[0][name] - parameters[1][name]) > PARTED).sum(1)
        alike = len(curve)
        if name in CHOOSING and astray.any():
            # Up to the first choice that falls otherwise nothing may differ; it has to be a rare one, and cost little.
            alike = int(np.argmax(astray > 0)) + 1
            assert astray[alike - 1] <= 4, (name, astray)
            assert curve == pytest.approx(second[name], abs=1e-3), name
        elif name not in ROUNDING:
            assert not astray.any(), (name, astray)
        tolerance = ROUNDING.get(name, 1e-6)
        assert curve[:alike] == pytest.approx(second[name][:alike], abs=tolerance), name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_four_ranks_train_like_two_where_compression_is_linear(told: Path, framework: str) -> None:
    """Of a sum: random_k and PowerSGD compress the ranks' sum; casts only round it."""
    two, four = (curves(told, f"mpirun-{ranks}-{framework}") for ranks in (2, 4))
    for name, tolerance in (("dense", 1e-6), ("random_k", 1e-6), ("power_sgd", 1e-6), ("fp16", 1e-4), ("bf16", 5e-3)):
        assert two[name] == pytest.approx(four[name], abs=tolerance), name
    assert two["top_k"] != pytest.approx(four["top_k"], abs=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_compressors_hold_their_properties(framework: str) -> None:
    done = launch("", 1, [*PYTEST, "tests/alone"], HVDLM_TEST_FRAMEWORK=framework, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
