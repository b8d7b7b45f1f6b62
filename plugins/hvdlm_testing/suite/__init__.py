"""The tests that ``--hvdlm-plugin`` adds to a run of pytest."""

from __future__ import annotations

import pytest


def fail(sentences: list[str]) -> None:
    """Fail with these sentences, without a traceback; pass if there are none."""
    if sentences:
        pytest.fail("\n".join(sentences), pytrace=False)
