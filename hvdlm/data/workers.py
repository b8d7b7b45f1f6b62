"""Encodes texts in several processes, in order, with a bounded number of texts in flight."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from hvdlm.data import passages, tokenizers
from hvdlm.data.passages import Passage
from hvdlm.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from hvdlm.diagnostics.probes import cores
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols import tokenizer as tokenizer_protocol

Label = TypeVar("Label")
Result = TypeVar("Result")
_SMALL = 1 << 23  # bytes that one process encodes before several have started
_SECONDS, _SECONDS_PER_MB = 10.0, 10.0  # of processor time for a text: 20 times what slow tokenizers take
_CHECK_SECONDS = 0.5
_IN_FLIGHT = 2  # texts for each worker that are being encoded or wait to be written


class WorkerDied(HvdlmError):
    """A worker process died, most often because memory ran out."""


class TooSlow(HvdlmError):
    """A text took longer to encode than any useful tokenizer does; ``label``: the text's."""

    label: Any = None


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
    tokenizer: Tokenizer, texts: Iterable[tuple[Passage | str, Label]], workers: int
) -> Iterator[tuple[Label, np.ndarray]]:
    """Yield every text's label with its ids, int32 ``[n]``, in order, whatever the number of ``workers``.

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
    pool: ProcessPoolExecutor, texts: Iterable[tuple[Passage | str, Label]], limit: int
) -> Iterator[tuple[Label, np.ndarray]]:
    waiting: deque[tuple[Label, Future[np.ndarray]]] = deque()
    for text, label in texts:
        waiting.append((label, pool.submit(_encode, text)))
        if len(waiting) >= limit:
            first, future = waiting.popleft()
            yield first, _labelled(first, future.result)
    for first, future in waiting:
        yield first, _labelled(first, future.result)


def _labelled(label: Label, action: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return action()
    except TooSlow as error:
        error.label = label
        raise


def encode(tokenizer: Tokenizer, text: Passage | str) -> np.ndarray:
    """Return the ids of ``text``, int32 ``[n]``.

    Raises:
        TooSlow: it takes too long.
        HvdlmError: the text can't be encoded.
    """
    return within_budget(tokenizer, len(text), lambda: passages.encode(tokenizer, text))


def within_budget(tokenizer: tokenizer_protocol.Tokenizer, size: int, action: Callable[[], Result]) -> Result:
    """Return the result of ``action``, which lets ``tokenizer`` read or write ``size`` characters.

    Processor time is limited, so that a machine that is busy with other work has no effect. The library can't be
    interrupted: a thread that takes too long is left behind, and ends with the process.

    Raises:
        TooSlow: it takes too long. A pattern such as ``a(?=a*b)`` takes hours for a megabyte of ``a``.
    """
    if not isinstance(tokenizer, BPETokenizer):
        return action()
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    limit = _SECONDS + _SECONDS_PER_MB * size / 1e6
    began = time.process_time()
    thread.start()
    while thread.is_alive():
        thread.join(_CHECK_SECONDS)
        if thread.is_alive() and time.process_time() - began > limit:
            patterns = shown(", ".join(_patterns(tokenizer.to_json())) or "none", 200)
            raise TooSlow(
                f"the tokenizer takes more than {limit:.0f} s for {size:,} characters: use another tokenizer, or leave "
                f"the text out. Its patterns: {patterns}."
            )
    return result.result()


def _patterns(value: Any) -> list[str]:
    """Return the regular expressions in a tokenizer's description."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value["Regex"]] if isinstance(value, dict) and isinstance(value.get("Regex"), str) else []
    return own + [pattern for item in items for pattern in _patterns(item)]


_tokenizer: Tokenizer  # of this worker process


def _begin(description: str) -> None:
    """Initialise a worker: it ends when its parent ends, in whatever way, and ignores interrupts."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # There is one worker for each core: threads of the library would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizers.from_json(json.loads(description))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(text: Passage | str) -> np.ndarray:
    return encode(_tokenizer, text)
