"""Tests the compressor on arrays; KERAS_BACKEND chooses the framework."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
from keras import ops
from template_compressor import BLOCK, make

from hvdlm.config import CompressionConfig


@pytest.fixture
def compressor():
    return make(CompressionConfig(algorithm="template_compressor"), 1, 0, 2)


def round_trip(compressor, array):
    step = ops.zeros((), "int32")
    payload = compressor.compress(ops.convert_to_tensor(array), step)
    return payload, ops.convert_to_numpy(compressor.decompress(payload, array.shape, step))


def test_only_the_largest_of_every_block_is_sent(compressor):
    array = np.random.default_rng(1).normal(size=5 * BLOCK).astype(np.float32)
    _, restored = round_trip(compressor, array)
    rows = array.reshape(-1, BLOCK)
    indices = np.abs(rows).argmax(1)
    expected = np.zeros_like(rows)
    expected[np.arange(5), indices] = rows[np.arange(5), indices]
    np.testing.assert_array_equal(restored.reshape(-1, BLOCK), expected)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 1000])
def test_any_length_is_restored(compressor, length):
    array = np.arange(1, length + 1, dtype=np.float32)
    payload, restored = round_trip(compressor, array)
    assert restored.shape == array.shape and restored[-1] == array[-1]
    assert sum(ops.convert_to_numpy(tensor).nbytes for tensor in payload) == compressor.payload_bytes(array.shape)


def test_the_payload_is_12_8_times_smaller(compressor):
    assert compressor.payload_bytes((16000,)) == 16000 * 4 / 12.8
