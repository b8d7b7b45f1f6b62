"""What ``prepare`` shows of a long work, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from hvdlm.io.terminal import clock, on_terminal, size

_FIRST = 1.0  # seconds until the bar shows: what is done by then needs none
_EVERY = 10.0  # seconds between two lines where there is no bar


class Progress:
    """One phase: the share of ``total`` bytes that has been read, tokens written, tokens per second, time left.

    Of a phase that goes on where an earlier one was killed, ``done`` bytes and ``tokens`` are there from the start.
    """

    def __init__(self, phase: str, total: int, done: int = 0, tokens: int = 0) -> None:
        self._phase, self._total, self._done, self._before = phase, max(1, total), done, (done, tokens)
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr is not None and on_terminal(sys.stderr):
            from tqdm import tqdm

            more = {"unit": "B", "unit_scale": True, "delay": _FIRST, "file": sys.stderr, "dynamic_ncols": True}
            self._bar = tqdm(total=self._total, initial=done, desc=phase, **more)

    def advance(self, count: int, tokens: int = 0) -> None:
        """Show that ``count`` bytes more have been read, and that all ``tokens`` are so many now."""
        now = time.monotonic()
        self._done += count
        if self._bar is not None:
            if tokens:
                self._bar.set_postfix_str(self._written(tokens, now), refresh=False)
            self._bar.update(count)
        elif now - self._shown >= _EVERY:
            self._shown = now
            say(self._line(tokens, now))

    def _line(self, tokens: int, now: float) -> str:
        left = (now - self._began) * (self._total - self._done) / max(1, self._done - self._before[0])
        parts = [f"{self._done / self._total:.0%} of {size(self._total)}", f"{clock(left)} left"]
        return f"{self._phase}: " + ", ".join([parts[0], self._written(tokens, now), parts[1]] if tokens else parts)

    def _written(self, tokens: int, now: float) -> str:
        rate = (tokens - self._before[1]) / max(1e-9, now - self._began)
        return f"{tokens:,} tokens, {rate:,.0f} tokens/s"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def say(text: str) -> None:
    """Write a line to standard error."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
