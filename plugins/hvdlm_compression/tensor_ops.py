"""Operations in place where the framework can overwrite tensors (PyTorch), and there without keras's time per call.

New memory of a gradient's size costs several times as much as what is written to it: its pages have to be mapped first.
A call of keras.ops on PyTorch's tensors takes about 10 us, a method of theirs 1 to 4: as much as a product with a small
matrix. Nothing is imported from the framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import backend, ops

from hvdlm.protocols.types import Tensor

OVERWRITES = backend.backend() == "torch"


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``tensor`` in another shape."""
    return tensor.reshape(shape) if OVERWRITES else ops.reshape(tensor, shape)


def transpose(matrix: Tensor) -> Tensor:
    """Return ``[columns, rows]``."""
    return matrix.T if OVERWRITES else ops.transpose(matrix)


def nonzero_or(tensor: Tensor, other: Tensor) -> Tensor:
    """Return ``tensor``, or ``other`` where all of ``tensor`` is zero."""
    return tensor.where(tensor.any(), other) if OVERWRITES else ops.where(ops.any(tensor != 0.0), tensor, other)


def on_host(tensor: Tensor) -> np.ndarray | None:
    """Return the values of ``tensor`` if they are known without waiting for a graph or a device, else None."""
    return tensor.numpy() if OVERWRITES and tensor.is_cpu else None


def keep(variable: Any, value: Tensor) -> None:
    """Assign ``value`` to a keras Variable, in whose memory it is where tensors can be overwritten."""
    if not OVERWRITES:
        variable.assign(value)


def store(target: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` in the dtype of ``target``, in the memory of ``target``."""
    return target.copy_(value) if OVERWRITES else ops.cast(value, target.dtype)


def add(target: Tensor, value: Tensor) -> Tensor:
    """Return ``target + value``, in the memory of ``target``."""
    return target.add_(value) if OVERWRITES else target + value


def product(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product ``left @ right``, in the memory of ``target``."""
    return target.addmm_(left, right, beta=0.0) if OVERWRITES else left @ right


def subtract_product(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``target - left @ right``, in the memory of ``target``: in one pass over it."""
    return target.addmm_(left, right, alpha=-1.0) if OVERWRITES else target - left @ right


def restore_unless(applied: Tensor, copies: Sequence[tuple[Any, Any]]) -> None:
    """Assign to Variables their copies, which come second, unless ``applied``, a scalar bool, is true."""
    if not OVERWRITES:

        def restore() -> Tensor:
            for variable, copy in copies:
                variable.assign(copy)
            return ops.convert_to_tensor(False)

        ops.cond(applied, lambda: ops.convert_to_tensor(True), restore)
    elif not applied.is_cpu:  # whose value the host doesn't know
        for variable, copy in copies:
            variable.assign(variable.value.where(applied, copy.value))
    elif not applied:
        for variable, copy in copies:
            variable.assign(copy)


def sparse(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Return ``[size]`` with ``values`` ``[n]`` at the int32 ``places`` ``[n]``, all different, and zeros."""
    if not OVERWRITES:
        return ops.segment_sum(values, places, num_segments=size)
    return values.new_zeros(size).index_add_(0, places, values)


def add_sparse(target: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Return ``target + sparse(values, places, size)``, in the memory of ``target``.

    Ranks' values are added rank by rank: of places that are not different, GPUs add in an order of their own, so that
    ranks would get different sums.
    """
    if not OVERWRITES:
        return target + sparse(values, places, target.shape[0])
    return target.index_add_(0, places, values)
