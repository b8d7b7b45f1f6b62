"""Encodes texts in several processes, in order, with a bounded number of texts in flight."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from hvdlm.data import tokenizers
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.data.tokenizers import ByteTokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io.machine import cores
from hvdlm_corpora import passages
from hvdlm_corpora.passages import EncodedPassage, Passage
from hvdlm_corpora.time_limit import TooSlow
from hvdlm_corpora.tokenizers import CharTokenizer

Label = TypeVar("Label")
_SMALL = 1 << 23  # bytes that one process encodes before several have started
_IN_FLIGHT = 2  # texts for each worker that are being encoded or wait to be written


class WorkerDied(HvdlmError):
    """A worker process died, most often because memory ran out."""


def choose(requested: int | None, tokenizer: Tokenizer, size: int) -> int:
    """Return how many processes encode ``size`` bytes: ``requested``, or else the number of this process's cores.

    One process encodes bytes and characters faster than it sends them to another (measured), and short texts sooner.
    """
    if requested is not None:
        return requested
    if size < _SMALL or isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return 1
    return cores()


def encoded(
    tokenizer: Tokenizer, texts: Iterable[tuple[Passage, Label]], workers: int
) -> Iterator[tuple[Label, EncodedPassage]]:
    """Yield every text's label with its ids, in order, whatever the number of ``workers``.

    Raises:
        HvdlmError: a text can't be encoded.
        WorkerDied: a worker process died.
    """
    if workers == 1:
        for text, label in texts:
            yield label, _labelled(label, functools.partial(encode, tokenizer, text))
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks, threads and a launcher's files
    start = json.dumps(tokenizer.to_json())
    with ProcessPoolExecutor(workers, context, _begin, (start,)) as pool:
        try:
            yield from _in_order(pool, texts, workers * _IN_FLIGHT)
        except BrokenProcessPool as error:
            raise WorkerDied(
                "an encoding worker died: if memory ran out, use fewer (--workers 1); the same command resumes where "
                "this one stopped."
            ) from error
        except TooSlow:
            for process in (pool._processes or {}).values():  # others may be at texts that take as long
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, texts: Iterable[tuple[Passage, Label]], limit: int
) -> Iterator[tuple[Label, EncodedPassage]]:
    waiting: deque[tuple[Label, Future[EncodedPassage]]] = deque()
    for text, label in texts:
        waiting.append((label, pool.submit(_encode, text)))
        if len(waiting) >= limit:
            first, future = waiting.popleft()
            yield first, _labelled(first, future.result)
    for first, future in waiting:
        yield first, _labelled(first, future.result)


def _labelled(label: Label, action: Callable[[], EncodedPassage]) -> EncodedPassage:
    try:
        return action()
    except TooSlow as error:
        error.label = label
        raise


def encode(tokenizer: Tokenizer, text: Passage) -> EncodedPassage:
    """Return the ids of ``text``.

    Raises:
        TooSlow: it takes too long.
        HvdlmError: the text can't be encoded.
    """
    return tokenizer.within_budget(len(text), lambda: passages.encode(tokenizer, text))


_tokenizer: Tokenizer  # of this worker process


def _begin(description: str) -> None:
    """Initialise a worker."""
    global _tokenizer
    end_with_parent()
    # There is one worker for each core: threads of the library would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.from_json(json.loads(description))


def end_with_parent() -> None:
    """Have this process end when its parent ends, in whatever way, and ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(text: Passage) -> EncodedPassage:
    return encode(_tokenizer, text)
