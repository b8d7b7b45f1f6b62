"""Collectives on the arrays of all members of a group, in one process: the result of each member.

Sums are added in the order of MPI's recursive doubling, (a0 + a1) + (a2 + a3): the same on every run, and on two
members the same as any MPI's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hvdlm_backends.mpi_collectives import combine, empty, shard_rows

Add = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], np.ndarray]
_HALF = ("float16", "bfloat16")


def all_reduce(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of the members' arrays, in memory of its own."""
    return _tree([array.reshape(-1) for array in arrays], _add).reshape(arrays[0].shape)


def adasum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the members' vectors, a power of two of them, combined pairwise (Maleki et al. 2020, eq. 3)."""
    wide = np.float64 if arrays[0].dtype == np.float64 else np.float32
    combined = _tree([array.astype(wide).reshape(-1) for array in arrays], lambda a, b, _: combine(a, b))
    return combined.reshape(arrays[0].shape).astype(arrays[0].dtype)


def all_gather(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the concatenation of the members' ``[n_i, ...]``."""
    first = arrays[0]
    gathered = empty((sum(len(array) for array in arrays), *first.shape[1:]), first.dtype)
    return np.concatenate(arrays, out=gathered)


def reduce_scatter(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return each member's shard ``[n / size, ...]`` of the sum; the first members take the remainder."""
    ends = np.cumsum(shard_rows(len(arrays[0]), len(arrays)))
    return np.split(all_reduce(arrays), ends[:-1])


def all_to_all(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return for member j chunk j of every member's equally split ``[n, ...]``."""
    chunks = [np.split(array, len(arrays)) for array in arrays]
    return [np.concatenate([own[member] for own in chunks]) for member in range(len(arrays))]


def copy_of(array: np.ndarray) -> np.ndarray:
    """Return a copy in memory that every framework can use."""
    copied = empty(array.shape, array.dtype)
    copied[...] = array
    return copied


def _add(a: np.ndarray, b: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return ``a + b``; 16-bit floats are added in float32 and rounded once, as ``mpi_collectives`` does."""
    total = empty(a.shape, a.dtype) if out is None else out
    with np.errstate(all="ignore"):  # infinite values are the step guard's to notice
        if a.dtype.name in _HALF:
            total[...] = (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)
            return total
        return np.add(a, b, out=total)


def _tree(arrays: Sequence[np.ndarray], add: Add) -> np.ndarray:
    """Return the sum of ``arrays``, none of which is overwritten.

    Of numbers that are no power of two, the first are added in pairs before, as in Open MPI's recursive doubling.
    """
    pairs = len(arrays) - (1 << (len(arrays).bit_length() - 1))
    terms = [arrays[2 * i : 2 * i + 2] for i in range(pairs)] + [[array] for array in arrays[2 * pairs :]]
    result, own = _total(terms, add)
    return result if own else copy_of(result)


# Not nested in ``_tree``: a function that refers to itself, and to the arrays, would keep their memory until Python
# next collects garbage, a vector of every rank for each step.
def _total(terms: Sequence[Sequence[np.ndarray]], add: Add) -> tuple[np.ndarray, bool]:
    """Return the sum of the terms, and whether it is in memory that may be overwritten."""
    if len(terms) == 1:
        term = terms[0]
        return (add(term[0], term[1], None), True) if len(term) == 2 else (term[0], False)
    middle = len(terms) // 2
    (left, left_own), (right, right_own) = _total(terms[:middle], add), _total(terms[middle:], add)
    return add(left, right, left if left_own else right if right_own else None), True
