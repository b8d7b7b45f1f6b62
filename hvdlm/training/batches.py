"""This rank's micro-batches, made by a thread while earlier steps are computed (``data.prefetch``)."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from hvdlm.diagnostics.phases import process
from hvdlm.protocols.types import Batch
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run import Run

THREAD = "hvdlm-batches"
"""Name of the thread."""

# Share of the time that batches may take in the main thread. Below it, a thread would cost more than it saves: it takes
# the interpreter lock and a core from the step (of shakespeare_char on 2 busy cores, 0.15% became 3%).
SHARE = 0.01
_END_SECONDS = 10.0  # waited for a batch that no step will take

Made = tuple[int, "Future[list[Batch]]"]
"""(the first row of a global batch, this rank's micro-batches of it)."""


class Batches:
    """The micro-batches of every step; the thread makes those of ``data.prefetch`` later steps ahead.

    The run's data cursor alone decides what is read. The thread follows a copy of it; where the next step reads
    other rows than those made ahead, as after a rollback, these are dropped.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ahead = run.config.data.prefetch if getattr(run.task, "rows_in_thread", True) else 0
        self._next: DataCursor = run.cursor
        self._queue: deque[Made] = deque()  # in the order of steps
        self._requests: SimpleQueue[Made | None] = SimpleQueue()
        self._taken = 0
        self._began = self._seconds = 0.0  # since the second step: when that was, what batches have taken
        # A daemon: an error of this rank ends the process even where the thread waits for a file system.
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._drop()
        self._requests.put(None)
        if self._thread.ident and kind is None:
            self._thread.join(_END_SECONDS)

    def take(self, row: int, left: int) -> list[Batch]:
        """Return the micro-batches of the global batch at ``row``, past which ``run.cursor`` has just moved.

        ``left``: steps that follow.

        Raises:
            Exception: what ``Task.rows`` raised for this batch.
        """
        if not self._uses_thread():
            began = time.perf_counter()
            batches = micro_batches(self._run, row)
            self._seconds += time.perf_counter() - began
            return batches
        if not self._queue or self._queue[0][0] != row:
            self._drop()
            self._next = copy.copy(self._run.cursor)
            self._request(row)
        while len(self._queue) <= min(self._ahead, left):
            self._request(self._next.advance())
        made = self._queue.popleft()[1]
        if made.done():
            return made.result()
        with process.during("waiting for its next batch"):
            return made.result()

    def _uses_thread(self) -> bool:
        """Return whether the thread makes batches: from when they took more than ``SHARE`` of the time on."""
        if self._thread.ident or not self._ahead:
            return self._ahead > 0
        self._taken += 1
        if self._taken <= 2:  # the first step builds graphs
            self._began, self._seconds = time.perf_counter(), 0.0
        elif self._seconds > SHARE * (time.perf_counter() - self._began):
            self._thread.start()
        return self._thread.ident is not None

    def _request(self, row: int) -> None:
        self._queue.append((row, Future()))
        self._requests.put(self._queue[-1])

    def _drop(self) -> None:
        for _, made in self._queue:
            made.cancel()
        self._queue.clear()

    def _work(self) -> None:
        while request := self._requests.get():
            row, made = request
            if made.set_running_or_notify_cancel():
                try:
                    made.set_result(micro_batches(self._run, row))
                except BaseException as error:  # raised by ``take`` where the batch is needed
                    made.set_exception(error)
            del request, made  # or the thread keeps a batch alive while it waits


def micro_batches(run: Run, row: int) -> list[Batch]:
    """Return this rank's rows of the global batch that begins at ``row``, split into micro-batches."""
    first, last = run.rows
    batch = run.task.rows(row + first, row + last)
    size = run.config.train.micro_batch_size or last - first
    return [batch.rows(start, start + size) for start in range(0, last - first, size)]
