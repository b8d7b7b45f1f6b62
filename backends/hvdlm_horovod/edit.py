"""An edit to a file of Horovod's source distribution."""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """Replace ``old`` by ``new`` in ``file`` (relative to the source folder), because of ``why``."""

    file: str
    old: str
    new: str
    why: str
