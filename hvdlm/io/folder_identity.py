"""Detects that a folder which is in use was removed, renamed or replaced."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path

from hvdlm.errors import RankError


class FolderIdentity:
    """The folder to which a path leads now; any or none where it can't be opened, as on a node that lacks it.

    As long as this object lives, no other folder gets its inode, and its file system stays mounted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, self._descriptor)

    def is_same(self) -> bool:
        """Return whether the path still leads to the same folder."""
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), os.stat(self._folder))
        except OSError:  # it is gone; on a network file system also the open one
            return False

    def check(self) -> None:
        """Raise RankError where the path no longer leads to the same folder."""
        if not self.is_same():
            raise RankError(
                f"the run's folder {self._folder} was removed, renamed or replaced while the run wrote to it. Move it "
                "back and resume with --checkpoint.resume auto, or start again."
            )
