"""A background thread for a tracker's calls, so that a slow server delays no step and a failing one ends no run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

from hvdlm.io.untrusted_input import shown

_MAX_MESSAGE = 300  # characters: some servers respond with a whole page


class Sender:
    """Runs actions one after the other in the background; warns about the first failure, and continues."""

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._warned = False
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon thread, so that a server which never responds doesn't keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"hvdlm-{tracker}", daemon=True)
        self._thread.start()

    def send(self, action: Callable[[], None]) -> None:
        """Queue ``action`` and return at once."""
        self._actions.put(action)

    def close(self, seconds: float) -> None:
        """Wait until all actions have run, at most ``seconds``."""
        self._actions.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"the last metrics were not accepted within {seconds:g} s and are lost")

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            try:
                action()
            except Exception as error:  # the library, the server and the network may fail in any way
                self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            message = shown(" ".join(problem.split()), _MAX_MESSAGE)
            print(f"hvdlm: {self._tracker}: {message}. Training continues, metrics are missing there.", file=sys.stderr)
            sys.stderr.flush()
