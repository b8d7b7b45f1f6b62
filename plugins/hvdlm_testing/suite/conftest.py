"""What the suite's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hvdlm_testing.launcher import Launches


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave the suite out of a run that finds it by chance, such as ``pytest .`` here."""
    return None if config.getoption("hvdlm_plugin") else True


@pytest.fixture(scope="session")
def launches(pytestconfig: pytest.Config) -> Launches:
    """Return what ranks found."""
    return pytestconfig.pluginmanager.get_plugin("hvdlm-conformance").launches  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Take back what a plugin sets in the environment."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
