"""Tests in ``tests/parallel`` run on every rank of a launch, those in ``tests/alone`` in one process per framework.

Both are started by test_launches.py, not in the launching process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launching import SMALL, launch

_LAUNCHED = ("parallel", "alone")
collect_ignore = (
    [] if "HVDLM_TEST_FRAMEWORK" in os.environ else [str(Path(__file__).parent / name) for name in _LAUNCHED]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest: where files are shared among processes, nobody then waits for it."""
    items.sort(key=lambda item: item.path.name != "test_launches.py")


@pytest.fixture(scope="session")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains once per set of options and returns the run's folder."""
    done: dict[tuple, Path] = {}

    def train(framework: str, ranks: int, *options: str, launcher: str = "mpirun") -> Path:
        key = (framework, ranks, options, launcher)
        if key not in done:
            run = tmp_path_factory.mktemp("run")
            arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(run), *SMALL, *options]
            finished = launch(launcher, ranks, arguments)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
            done[key] = run
        return done[key]

    return train
