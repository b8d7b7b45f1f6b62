"""Tests in ``tests/parallel`` run on every rank of a launch (see test_launches.py), not in the launching process."""

from __future__ import annotations

import os
from pathlib import Path

collect_ignore = [] if "HVDLM_TEST_RANKS" in os.environ else [str(Path(__file__).parent / "parallel")]
