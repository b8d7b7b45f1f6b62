"""Results that a backend returns through host memory: arrays of any memory, in one framework a process."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest

from hvdlm.protocols.group import Done
from launching import FRAMEWORK

SIZE = 4096


def offset(array: np.ndarray, start: int) -> np.ndarray:
    """Return a copy that begins ``start`` bytes after a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    first = -memory.ctypes.data % 64 + start
    copied = memory[first : first + array.nbytes].view(array.dtype)
    copied[:] = array
    return copied


MADE = {
    "aligned": lambda array: offset(array, 0),
    "after_16_bytes": lambda array: offset(array, 16),
    "after_4_bytes": lambda array: offset(array, 4),
    "read_only": lambda array: np.frombuffer(array.tobytes(), array.dtype),
    "strided": lambda array: np.repeat(array, 2)[::2],
    "reversed": lambda array: array[::-1].copy()[::-1],
}


@pytest.fixture(scope="module")
def library():
    """Return (HostTensors, function from numpy to tensor, function that runs another as a training step is)."""
    if FRAMEWORK == "torch":
        import torch

        from hvdlm_torch.host_tensors import HostTensors

        return HostTensors(), torch.from_numpy, lambda function: function
    import tensorflow as tf

    from hvdlm_tensorflow.host_tensors import HostTensors

    return HostTensors(), tf.constant, partial(tf.function, autograph=False)


@pytest.mark.parametrize("made", list(MADE))
@pytest.mark.parametrize("traced", [False, True])
def test_a_backend_may_return_any_array(library, made: str, traced: bool) -> None:
    tensors, tensor, graph = library

    def doubled(array: np.ndarray, arrived: object) -> Done:
        return Done(MADE[made](array * 2))

    def negative_squares(values):
        result = tensors.through(values, doubled, (SIZE,)).wait()
        return -(result * result)

    values = np.arange(SIZE, dtype=np.float32)
    function = graph(negative_squares) if traced else negative_squares
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch only warns about memory that can't be written
        result = np.asarray(function(tensor(values.copy())))
    np.testing.assert_array_equal(result, -4 * values * values)


@pytest.mark.parametrize("made", list(MADE))
def test_sums_of_several_tensors_may_be_any_array(library, made: str) -> None:
    tensors, tensor, _ = library
    arrays = [np.arange(n, dtype=np.float32) for n in (5, 600, 1)]

    def doubled(array: np.ndarray, arrived: object) -> Done:
        return Done(MADE[made](array * 2))

    sums = tensors.together([tensor(array.copy()) for array in arrays], doubled).wait()
    for total, array in zip(sums, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(-total), -2 * array)
