"""Starts the multi-rank tests under the real launchers: pytest runs on every rank."""

from __future__ import annotations

import pytest

from launching import launch

LAUNCHES = [("mpirun", 2), ("mpirun", 4), ("horovodrun", 2), ("horovodrun --gloo", 2)]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("launcher, ranks", LAUNCHES)
def test_every_rank_passes(launcher: str, ranks: int, framework: str) -> None:
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/parallel"]
    done = launch(launcher, ranks, command, HVDLM_TEST_FRAMEWORK=framework, HVDLM_TEST_RANKS=str(ranks))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == ranks, done.stdout[-3000:]
