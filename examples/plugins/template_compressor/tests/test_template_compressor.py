"""A compressor is tested on arrays; KERAS_BACKEND chooses the framework that computes it."""

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


def there_and_back(compressor, array):
    step = ops.zeros((), "int32")
    payload = compressor.compress(ops.convert_to_tensor(array), step)
    return payload, ops.convert_to_numpy(compressor.decompress(payload, array.shape, step))


def test_the_largest_of_every_block_stays(compressor):
    array = np.random.default_rng(1).normal(size=5 * BLOCK).astype(np.float32)
    _, back = there_and_back(compressor, array)
    rows, kept = array.reshape(-1, BLOCK), back.reshape(-1, BLOCK)
    places = np.abs(rows).argmax(1)
    expected = np.zeros_like(rows)
    expected[np.arange(5), places] = rows[np.arange(5), places]
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 1000])
def test_any_length_comes_back(compressor, length):
    array = np.arange(1, length + 1, dtype=np.float32)
    payload, back = there_and_back(compressor, array)
    assert back.shape == array.shape and back[-1] == array[-1]
    assert sum(ops.convert_to_numpy(part).nbytes for part in payload) == compressor.payload_bytes(array.shape)


def test_the_payload_is_a_twelfth(compressor):
    assert compressor.payload_bytes((16000,)) == 16000 * 4 / 12.8
