"""Files to which a run appends records: metrics, events of TensorBoard."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hvdlm.io import safe_files

_KEPT_BYTES = 2**24


class AppendFile:
    """A file to which records are appended. What can't be written, as on a full disk, is kept and written later.

    Only the file's last record may be incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = safe_files.open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._pending = b""
        self._lost = False

    def write(self, record: bytes) -> None:
        """Append ``record``, after those that could not be written before.

        Raises:
            OSError: it could not be written; it is kept, unless 16 MiB are kept already.
        """
        if len(self._pending) + len(record) > _KEPT_BYTES:
            self._lost = True
        else:
            self._pending += record
        while self._pending:
            self._pending = self._pending[os.write(self._descriptor, self._pending) :]

    def flush(self) -> None:
        """Do nothing: ``write`` leaves nothing in a buffer."""

    def close(self) -> None:
        """Write what is still to be written, and close.

        Raises:
            OSError: records are lost.
        """
        try:
            self.write(b"")
            if self._lost:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(self._descriptor)
