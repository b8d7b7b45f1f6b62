"""How likely sequences are: what a language model gives them, all tokens in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from hvdlm_tasks.items import up_to
from hvdlm_tasks.pairs import padded

from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch

_STEP = 16  # tokens by which batches differ in length
_SCORES = 1 << 22  # scores that are computed at once


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of ``scores`` ``[..., vocab]``, float64."""
    wide = scores.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


class _Window(NamedTuple):
    """Targets ``start:stop`` of a row, of which those from ``first`` on count."""

    row: int
    start: int
    first: int
    stop: int


def sequence_logs(trainable: Trainable, rows: Sequence[np.ndarray], given: int, context: int, vocab: int) -> np.ndarray:
    """Return the log-probability of every row's ids from number ``given`` (1 at least) on, float64 ``[rows]``.

    ``rows``: int32 ``[time]`` each, of any lengths; what comes after ``context`` ids is scored with half as many before
    it at least. ``vocab``: the model's, which says how many rows fit into a batch. No communication.
    """
    windows = [_Window(i, *found) for i, row in enumerate(rows) for found in _windows(given - 1, len(row) - 1, context)]
    windows.sort(key=lambda w: w.stop - w.start)
    found = np.zeros(len(rows))
    while windows:
        time = min(up_to(windows[-1].stop - windows[-1].start, _STEP), context)
        count = max(1, _SCORES // (time * vocab))
        windows, chosen = windows[:-count], windows[-count:]
        np.add.at(found, [w.row for w in chosen], _scored(trainable, rows, chosen, time))
    return found


def _windows(first: int, count: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first target that counts, stop) of windows that count the targets ``first:count`` once each."""
    stop = min(count, context)
    yield 0, min(first, stop), stop
    while stop < count:
        first, stop = max(first, stop), min(count, stop + max(1, context // 2))
        yield stop - context, first, stop


def _scored(trainable: Trainable, rows: Sequence[np.ndarray], windows: Sequence[_Window], time: int) -> np.ndarray:
    """Return the log-probability of what counts in every window, float64 ``[windows]``."""
    inputs, _ = padded([rows[w.row][w.start : w.stop] for w in windows], time)
    targets, counted = padded([rows[w.row][w.start + 1 : w.stop + 1] for w in windows], time)
    for weights, w in zip(counted, windows, strict=True):
        weights[: w.first - w.start] = 0
    logs = log_softmax(trainable.predict(Batch(inputs, targets, counted, True)))
    return (np.take_along_axis(logs, targets[..., None], -1)[..., 0] * counted).sum(-1)
