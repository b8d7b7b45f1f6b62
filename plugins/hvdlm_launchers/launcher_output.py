"""Cleans the output of launchers: no prefixes of ranks, no greetings of libraries, no notices that repeat an error."""

from __future__ import annotations

import re

_PREFIX = re.compile(rb"\[\d+(?:,\d+)?\]<std(?:out|err)>: ?")
_GREETINGS = re.compile(
    rb"WARNING: All log messages before absl|I0000 .*(?:port|cpu_feature_guard)\.cc|To enable the following instr"
)
# What Open MPI prints after a rank has ended the run: hvdlm has reported why. That a signal killed a rank stays.
_NOTICES = re.compile(
    rb"-{60,}$|Primary job +terminated normally, but|a non-zero exit code\. Per user-direction|"
    rb"(?:mpirun|prterun) detected that one or more processes exited with non-zero status|"
    rb"the job to be terminated\. The first process to do so was:|MPI_ABORT was invoked on rank|"
    rb"with errorcode -?\d+\.|NOTE: invoking MPI_ABORT|You may or may not see output from other processes|"
    rb"exactly when Open MPI kills them|\s+(?:Proc: \[|Errorcode: |Process name: \[|Exit code:)"
)


class OutputCleaner:
    """Cleans one stream, line by line; a progress bar ends its lines with a carriage return.

    ``prefixed``: every line of a rank has a prefix, as under horovodrun. Lines without one are the launcher's own: they
    are kept in ``launcher_lines`` instead of shown.
    """

    def __init__(self, prefixed: bool) -> None:
        self._prefixed = prefixed
        self._unfinished = b""
        self._after_notice = False
        self.launcher_lines: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """Return what is to be shown of ``data``, the next bytes of the stream; a line waits for its end."""
        *lines, self._unfinished = re.split(rb"(?<=[\r\n])", self._unfinished + data)
        return b"".join(map(self._clean, lines))

    def end(self) -> bytes:
        """Return what is left at the end of the stream."""
        line, self._unfinished = self._unfinished, b""
        return self._clean(line) if line else b""

    def _clean(self, line: bytes) -> bytes:
        prefix = _PREFIX.match(line)
        text = line[prefix.end() :] if prefix else line
        if self._prefixed and not prefix:
            self.launcher_lines.append(line)
            return b""
        # Blank lines within a notice go with it.
        if _GREETINGS.match(text) or _NOTICES.match(text) or (self._after_notice and not text.strip()):
            self._after_notice = True
            return b""
        self._after_notice = False
        return text
