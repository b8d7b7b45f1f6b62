"""Tests in ``tests/parallel`` run on every rank of a launch, those in ``tests/alone`` in one process per framework.

Both are started by test_launches.py, not in the launching process.
"""

from __future__ import annotations

import os
from pathlib import Path

_LAUNCHED = ("parallel", "alone")
collect_ignore = (
    [] if "HVDLM_TEST_FRAMEWORK" in os.environ else [str(Path(__file__).parent / name) for name in _LAUNCHED]
)
