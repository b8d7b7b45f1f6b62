"""Log-probabilities of sequences under a language model, all tokens in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_language.padding import pad_rows, round_up

_LENGTH_MULTIPLE = 16  # tokens to a multiple of which batches are padded
_MAX_LOGITS = 1 << 22  # of a batch, which bounds the memory


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of logits ``[..., vocab]``, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class _Window(NamedTuple):
    """Targets ``start:stop`` of a row; those from ``first`` on are scored."""

    row: int
    start: int
    first: int
    stop: int


def sequence_logs(trainable: Trainable, rows: Sequence[np.ndarray], given: int, context: int, vocab: int) -> np.ndarray:
    """Return the log-probability of every row's ids from index ``given`` on, float64 ``[rows]``, without communication.

    Args:
        trainable: the language model.
        rows: int32 ``[time]`` each, of any lengths.
        given: the number of ids, at least 1, that are given and not scored.
        context: the model's longest input; ids beyond it are scored with at least half as many before them.
        vocab: the model's vocabulary, which limits the rows of a batch.
    """
    windows = [_Window(i, *ends) for i, row in enumerate(rows) for ends in _windows(given - 1, len(row) - 1, context)]
    windows.sort(key=lambda w: w.stop - w.start)
    logs = np.zeros(len(rows))
    while windows:
        time = min(round_up(windows[-1].stop - windows[-1].start, _LENGTH_MULTIPLE), context)
        count = max(1, _MAX_LOGITS // (time * vocab))
        windows, batch = windows[:-count], windows[-count:]
        np.add.at(logs, [w.row for w in batch], _score(trainable, rows, batch, time))
    return logs


def _windows(first: int, count: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored target, stop) of windows that score each of the targets ``first:count`` once."""
    stop = min(count, context)
    yield 0, min(first, stop), stop
    while stop < count:
        first, stop = max(first, stop), min(count, stop + max(1, context // 2))
        yield stop - context, first, stop


def _score(trainable: Trainable, rows: Sequence[np.ndarray], windows: Sequence[_Window], time: int) -> np.ndarray:
    """Return the log-probability of every window's scored targets, float64 ``[windows]``."""
    inputs, _ = pad_rows([rows[w.row][w.start : w.stop] for w in windows], time)
    targets, all_weights = pad_rows([rows[w.row][w.start + 1 : w.stop + 1] for w in windows], time)
    for weights, w in zip(all_weights, windows, strict=True):
        weights[: w.first - w.start] = 0
    logs = log_softmax(trainable.predict(Batch(inputs, targets, all_weights, True)))
    return (np.take_along_axis(logs, targets[..., None], -1)[..., 0] * all_weights).sum(-1)
