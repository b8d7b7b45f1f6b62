"""Adapt docstrings to the Markdown of the documentation site: ``::`` before a block of equations becomes a colon."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Extension that rewrites every docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace ``::`` at the end of a line with a colon."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.M)
