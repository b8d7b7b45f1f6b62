"""A thread that talks to a tracker: a server that hangs holds up no step, and one that fails ends no run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

from hvdlm.io.untrusted_input import shown

_SENTENCE = 300  # characters: servers answer with whole pages


class Sender:
    """Does actions one after the other in the background; says once what went wrong, and goes on."""

    def __init__(self, tracker: str) -> None:
        self._tracker, self._warned = tracker, False
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: what a server never answers keeps no process alive.
        self._thread = threading.Thread(target=self._work, name=f"hvdlm-{tracker}", daemon=True)
        self._thread.start()

    def send(self, action: Callable[[], None]) -> None:
        """Have ``action`` done after those before it; return at once."""
        self._actions.put(action)

    def close(self, seconds: float) -> None:
        """Wait until all is done, but not longer than ``seconds``."""
        self._actions.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"what was logged last was not taken within {seconds:g} s and is lost")

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            try:
                action()
            except Exception as error:  # a library, a server and a network between them may fail in any way
                self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            said = shown(" ".join(what.split()), _SENTENCE)
            print(f"hvdlm: {self._tracker}: {said}. Training goes on, figures are missing there.", file=sys.stderr)
            sys.stderr.flush()
