"""Texts are encoded by several processes, in order, a bounded number of them at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import numpy as np

from hvdlm.data import tokenizers
from hvdlm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from hvdlm.diagnostics.probes import cores
from hvdlm.errors import HvdlmError

Label = TypeVar("Label")
_SMALL = 1 << 23  # bytes that are encoded before several processes have started
_AHEAD = 2  # texts for each worker that are under way or wait to be written


class WorkerDied(HvdlmError):
    """A worker was ended from outside, most often because memory ran out."""


def choose(asked: int | None, tokenizer: Tokenizer, size: int) -> int:
    """Return how many processes encode ``size`` bytes: what was asked for, else this process's cores.

    Bytes and characters become tokens faster than they reach another process (measured), and short texts sooner.
    """
    if asked is not None:
        return asked
    if size < _SMALL or isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return 1
    return cores()


def encoded(
    tokenizer: Tokenizer, texts: Iterable[tuple[str, Label]], workers: int
) -> Iterator[tuple[Label, np.ndarray]]:
    """Yield every text's label with its ids, int32 ``[n]``, in order, whatever the number of ``workers``.

    Raises:
        HvdlmError: a text can't be encoded.
        WorkerDied: a worker was ended.
    """
    if workers == 1:
        yield from ((label, tokenizer.encode(text)) for text, label in texts)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks, threads and what a launcher opened
    start = json.dumps(tokenizer.to_json())
    with ProcessPoolExecutor(workers, context, _begin, (start,)) as pool:
        try:
            yield from _in_order(pool, texts, workers * _AHEAD)
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker that encodes died: if memory ran out, take fewer (--workers 1); the same command goes on "
                "where this one was."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, texts: Iterable[tuple[str, Label]], most: int
) -> Iterator[tuple[Label, np.ndarray]]:
    waiting: deque[tuple[Label, Future[np.ndarray]]] = deque()
    for text, label in texts:
        waiting.append((label, pool.submit(_encode, text)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


_tokenizer: Tokenizer  # of a worker


def _begin(description: str) -> None:
    """Begin a worker: it ends with the process that started it, however that ends, and leaves signals to it."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One worker for each core: a library that starts threads besides would only make them wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.from_json(json.loads(description))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(text: str) -> np.ndarray:
    return _tokenizer.encode(text)
