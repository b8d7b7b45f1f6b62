"""Log-probabilities of sequences under a language model, all tokens in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hvdlm.diagnostics.phases import process
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


def sequence_logs(trainable: Trainable, rows: Sequence[np.ndarray], given: int, context: int, vocab: int) -> np.ndarray:
    """Return the log-probability of every row's ids from index ``given`` on, float64 ``[rows]``, without communication.

    Args:
        trainable: the language model.
        rows: int32 ``[time]`` each, of any lengths.
        given: the number of ids, at least 1, that are given and not scored.
        context: the model's longest input; ids beyond it are scored with at least half as many before them.
        vocab: the model's vocabulary, which limits the rows of a batch.
    """
    owners, windows, counts = [], [], []
    for owner, row in enumerate(rows):
        for start, first, stop in _windows(given - 1, len(row) - 1, context):
            owners.append(owner)
            windows.append(row[start : stop + 1])
            counts.append(stop - first)
    scored, _ = end_logs(trainable, windows, counts, context, vocab)
    return np.bincount(owners, scored, len(rows))


def _windows(first: int, count: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored target, stop) of windows that score each of the targets ``first:count`` once."""
    stop = min(count, context)
    yield 0, min(first, stop), stop
    while stop < count:
        first, stop = max(first, stop), min(count, stop + max(1, context // 2))
        yield stop - context, first, stop


def end_logs(
    trainable: Trainable, rows: Sequence[np.ndarray], counts: Sequence[int], context: int, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how probable the ends of rows are, given their beginnings, without communication.

    Args:
        trainable: the language model.
        rows: int32 ``[time]`` each, of at most ``context + 1`` ids.
        counts: of every row, how many ids at its end are scored, fewer than it has.
        context: the model's longest input.
        vocab: the model's vocabulary, which limits the rows of a batch.

    Returns:
        float64 ``[rows]``, the log-probability of the ids; bool ``[rows]``, whether each of them is the most probable
        one at its position.
    """
    logs, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    while order:
        time = min(round_up(len(rows[order[-1]]) - 1, _LENGTH_MULTIPLE), context)
        count = max(1, _MAX_LOGITS // (time * vocab))
        order, batch = order[:-count], order[-count:]
        logs[batch], greedy[batch] = _score(trainable, [rows[i] for i in batch], [counts[i] for i in batch], time)
        process.alive()
    return logs, greedy


def _score(
    trainable: Trainable, rows: Sequence[np.ndarray], counts: Sequence[int], time: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``end_logs`` does of one batch."""
    inputs, _ = pad_rows([row[:-1] for row in rows], time)
    targets, all_weights = pad_rows([row[1:] for row in rows], time)
    for weights, row, count in zip(all_weights, rows, counts, strict=True):
        weights[: len(row) - 1 - count] = 0
    scored = all_weights > 0
    logs = log_softmax(trainable.predict(Batch(inputs, targets, all_weights, True))[scored])  # [targets, vocab]
    owners, ids = np.nonzero(scored)[0], targets[scored]
    sums = np.bincount(owners, np.take_along_axis(logs, ids[:, None], 1)[:, 0], len(rows))
    return sums, np.bincount(owners, logs.argmax(1) != ids, len(rows)) == 0
