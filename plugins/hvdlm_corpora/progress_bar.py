"""Progress of ``prepare`` on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

from hvdlm.diagnostics.phases import process
from hvdlm.io import launcher_env
from hvdlm.io.terminal import clock, on_terminal, printable, size

_DELAY = 1.0  # seconds until the bar appears: shorter phases need none
_LINE_SECONDS = 10.0  # between two lines where there is no bar


class ProgressBar:
    """Progress of one phase: the fraction of ``total`` bytes that are read, tokens written, tokens/s and time left.

    A phase that resumes after an interruption starts with ``done`` bytes and ``tokens``.
    """

    def __init__(self, phase: str, total: int, done: int = 0, tokens: int = 0) -> None:
        self._phase = phase
        self._total = max(1, total)
        self._done = done
        self._done_before = done
        self._tokens_before = tokens
        self._began = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr is not None and on_terminal(sys.stderr):
            from tqdm import tqdm

            options = {"unit": "B", "unit_scale": True, "delay": _DELAY, "file": sys.stderr, "dynamic_ncols": True}
            self._bar = tqdm(total=self._total, initial=done, desc=phase, **options)

    def advance(self, count: int, tokens: int = 0) -> None:
        """Show that ``count`` more bytes have been read; ``tokens``: how many have been written in all."""
        process.alive()
        now = time.monotonic()
        self._done += count
        if self._bar is not None:
            if tokens:
                self._bar.set_postfix_str(self._written(tokens, now), refresh=False)
            self._bar.update(count)
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            print_line(self._line(tokens, now))

    def _line(self, tokens: int, now: float) -> str:
        left = (now - self._began) * (self._total - self._done) / max(1, self._done - self._done_before)
        written = [self._written(tokens, now)] if tokens else []
        figures = [f"{self._done / self._total:.0%} of {size(self._total)}", *written, f"{clock(left)} left"]
        return f"{self._phase}: " + ", ".join(figures)

    def _written(self, tokens: int, now: float) -> str:
        rate = (tokens - self._tokens_before) / max(1e-9, now - self._began)
        return f"{tokens:,} tokens, {rate:,.0f} tokens/s"

    def close(self) -> None:
        """Close the bar, leaving it on the screen."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


@functools.lru_cache(maxsize=4096)
def note(text: str) -> None:
    """Print a line on the data to standard error, once, and not on every rank."""
    if launcher_env.rank_for_messages() == 0:
        print_line(f"hvdlm: {text}")


def print_line(text: str) -> None:
    """Print a line to standard error, where there is one."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)
