"""Properties of compressors on any vector: contraction or unbiasedness. One framework a process (test_launches.py)."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = FRAMEWORK = os.environ["HVDLM_TEST_FRAMEWORK"]

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import Variable
from parallel import references

from hvdlm import plugins
from hvdlm.config import CompressionConfig

MAKERS = plugins.provided(plugins.load(["compression"]), "compressors")


@pytest.fixture(scope="session")
def tensor() -> Any:
    """Return a function from numpy to the framework's tensor."""
    from keras import ops

    return ops.convert_to_tensor


def compressor(algorithm: str, seed: int = 1, **options: Any) -> Any:
    return MAKERS[algorithm](CompressionConfig(algorithm=algorithm, block=references.BLOCK, **options), seed, 0, 1)


def round_trip(compressor: Any, vector: np.ndarray, tensor: Any, step: int = 0) -> np.ndarray:
    """Return a vector after compression and decompression."""
    number = tensor(np.array(step, np.int32).reshape(1))[0]
    shape = tuple(vector.shape)
    return np.asarray(compressor.decompress(compressor.compress(tensor(vector), number), shape, number))


vectors = st.integers(0, 2**31).map(
    lambda seed: (
        np.random.default_rng(seed).standard_t(2, 700) * 10.0 ** np.random.default_rng(seed).integers(-6, 6)
    ).astype(np.float32)
)
# One source serves both frameworks, of which TensorFlow takes ten times as long for an operation that isn't in a graph.
everywhere = settings(
    max_examples=10 if FRAMEWORK == "torch" else 4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@everywhere
@given(vector=vectors, step=st.integers(0, 10**6))
def test_top_k_and_scaled_sign_contract(tensor: Any, vector: np.ndarray, step: int) -> None:
    """Stich et al. 2018, eq. 7: (1 - k/n); Karimireddy et al. 2019, lemma 8: 1 - ||x||_1^2 / (n ||x||^2), by block."""
    square = float(np.sum(vector.astype(np.float64) ** 2))
    error = vector.astype(np.float64) - round_trip(compressor("top_k"), vector, tensor)
    assert np.sum(error**2) <= (1 - 7 / 700) * square * (1 + 1e-6)
    error = vector.astype(np.float64) - round_trip(compressor("scaled_sign"), vector, tensor)
    kept = sum(np.sum(np.abs(p)) ** 2 / len(p) for p in references._blocks(vector.astype(np.float64)))
    assert np.sum(error**2) == pytest.approx(square - kept, rel=1e-3, abs=1e-6 * square)


@everywhere
@given(vector=vectors, first=st.integers(0, 10**6))
def test_random_k_contracts_on_average(tensor: Any, vector: np.ndarray, first: int) -> None:
    """Stich et al. 2018, eq. 7, in expectation: every element is sent with probability k/n, here once in n/k steps."""
    chosen = compressor("random_k")
    sent = [round_trip(chosen, vector, tensor, step) for step in range(first, first + 10)]
    np.testing.assert_array_equal(np.sum(sent, axis=0), vector)
    error = sum(np.sum((vector - decoded).astype(np.float64) ** 2) for decoded in sent) / 10
    assert error == pytest.approx((1 - 0.1) * np.sum(vector.astype(np.float64) ** 2), rel=1e-6)
    ones = np.ones(700, np.float32)
    share = np.mean([round_trip(compressor("random_k", seed), ones, tensor, first) for seed in range(200)], axis=0)
    assert share.mean() == pytest.approx(0.1) and share.max() < 0.25 and share.min() > 0.01


@everywhere
@given(vector=vectors, algorithm=st.sampled_from(["qsgd", "int8"]), bits=st.sampled_from([2, 4, 8]))
def test_quantisation_is_unbiased(tensor: Any, vector: np.ndarray, algorithm: str, bits: int) -> None:
    """Alistarh et al. 2017, lemma 3.1: the mean over steps is the vector, within five standard errors."""
    chosen = compressor(algorithm, bits=bits)
    draws = 100
    mean = np.mean([round_trip(chosen, vector, tensor, step).astype(np.float64) for step in range(draws)], axis=0)
    levels = 127 if algorithm == "int8" else 2 ** (bits - 1) - 1
    norm = np.linalg.norm if algorithm == "qsgd" else lambda p: np.abs(p).max()
    width = np.concatenate([np.full(len(p), norm(p) / levels) for p in references._blocks(vector)])
    assert np.all(np.abs(mean - vector) <= 5 * width / 2 / np.sqrt(draws) + 1e-5 * width)


@everywhere
@given(seed=st.integers(0, 2**31))
def test_power_sgd_never_increases_the_error(tensor: Any, seed: int) -> None:
    """A projection (Vogels et al. 2019): ||M - P P^T M|| <= ||M||, and nothing is left of a matrix of low rank."""
    random = np.random.default_rng(seed)
    for rank in (3, 20):
        matrix = (random.normal(size=(30, rank)) @ random.normal(size=(rank, 50))).astype(np.float32)
        chosen = compressor("power_sgd")
        total = matrix
        for _ in range(2):
            memory = {k: Variable(v, trainable=False) for k, v in chosen.memory((30, 50)).items()}
            jobs = chosen.reduce(tensor(matrix), memory, None)
            request = next(jobs)
            request = jobs.send(request.tensors)
            with pytest.raises(StopIteration) as stop:
                jobs.send(request.tensors)
            total = np.asarray(stop.value.value[0])
        error = np.linalg.norm(matrix - total) / np.linalg.norm(matrix)
        assert error <= 1 + 1e-6 and (rank > 4 or error < 1e-3)
