"""Standard output and error that survive their readers, text made safe for a terminal, sizes and durations as text."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from hvdlm.io import launcher_env

COLUMNS = "HVDLM_TERMINAL_COLUMNS"
"""Environment variable: the width of the terminal on which ``python -m hvdlm run`` shows the output of its ranks."""
_HARMLESS = "\n\t\u200c\u200d"  # and the joiners of Persian, Indic scripts and emoji

# The reader is gone: nothing that is written later will arrive. Other errors, like a full disk, may pass.
_PERMANENT = (errno.EPIPE, errno.EBADF, errno.ECONNRESET)


class SurvivingStream:
    """A text stream that never raises: what can't be written is dropped, what can't be encoded is escaped.

    A process whose ``| head`` has ended, whose log fills a disk or whose launcher is dead continues to work.

    Attributes:
        error: the first error of writing, or None.
        on_error: called with the first error.
        is_result: whether the command exists to print this, so that a loss makes it fail.
    """

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], Any]) -> None:
        self._stream = stream
        self.on_error = on_error
        self.error: OSError | None = None
        self.is_result = True
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    @property
    def reader_is_gone(self) -> bool:
        """Whether nothing that is written any more will be read."""
        return self.error is not None and self.error.errno in _PERMANENT

    def write(self, text: str) -> int:
        """Write ``text``; return its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, as far as possible."""
        self._attempt(self._stream.flush)

    def end(self) -> None:
        """Flush for the last time; what still can't be written is dropped, for it would fail Python's own flush."""
        self.flush()
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._to_null()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except ValueError:  # the stream is closed
            return
        except OSError as error:
            if error.errno in _PERMANENT:
                self._to_null()
            if self.error is None:
                self.error = error
                self.on_error(error)

    def _to_null(self) -> None:
        """Lead the stream's descriptor to /dev/null, for what is buffered and for libraries that write to it."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


@contextlib.contextmanager
def surviving_streams() -> Iterator[SurvivingStream]:
    """Replace standard output and error by streams that never raise, within the context; yield standard output's.

    A descriptor that is closed (``>&-``) is opened on /dev/null: the next file that the process opens would otherwise
    receive what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:  # Python has None in place of a closed stream
        errors = SurvivingStream(before[1] or null, lambda error: None)
        output = SurvivingStream(before[0] or null, lambda error: _report_loss(output, error))
        sys.stdout, sys.stderr = output, errors
        try:
            yield output
        finally:
            output.end()
            errors.end()
            sys.stdout, sys.stderr = before


def _report_loss(output: SurvivingStream, error: OSError) -> None:
    """Report that standard output can't be written, unless its reader did not want more (``| head``)."""
    if not output.reader_is_gone:
        print(f"hvdlm: standard output can't be written: {error.strerror}.", file=sys.stderr, flush=True)


def on_terminal(stream: TextIO | None = None) -> bool:
    """Return whether ``stream`` (None: standard output) is a terminal, and no launcher has started this process.

    Launchers give every rank a terminal, but may redirect their own output to a file, and ``horovodrun`` prefixes every
    write with the rank's number; ``python -m hvdlm run`` knows better.
    """
    if launcher_env.started_by_launcher():
        return columns() is not None and stream in (None, sys.stdout)
    stream = stream or sys.stdout
    return stream is not None and stream.isatty()


def columns() -> int | None:
    """Return the width of the terminal that shows a rank's output; None where it has to be asked."""
    value = os.environ.get(COLUMNS, "")
    return int(value) if value.isascii() and value.isdigit() and launcher_env.started_by_launcher() else None


def printable(text: object) -> str:
    """Return ``text`` with a question mark for all that a terminal would act upon; line ends and tabs stay.

    Everything that is printed of a file, of another program's output or of a plugin passes through here: control
    characters move the cursor, set the window's title or hide text, and bidirectional marks change its order.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c in _HARMLESS else "?" for c in line)


def size(count: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def clock(seconds: float) -> str:
    """Format a duration as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
