"""Fixtures of the conformance suite."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from hvdlm_testing.checks.harness import location
from hvdlm_testing.launcher import Launches


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignore the suite in a run without ``--hvdlm-plugin``, such as ``pytest .`` in this folder."""
    return None if config.getoption("hvdlm_plugin") else True


@pytest.fixture(scope="session")
def launches(pytestconfig: pytest.Config) -> Launches:
    """Return the launches, which have the results of the ranks."""
    return pytestconfig.pluginmanager.get_plugin("hvdlm-conformance").launches  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """Undo what a plugin sets in the environment."""
    original = dict(os.environ)
    yield
    for name in set(os.environ) - set(original):
        del os.environ[name]
    os.environ.update(original)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Report an exception that a plugin raises as one sentence: the traceback is mostly that of the suite."""
    try:
        return (yield)
    except (pytest.fail.Exception, pytest.skip.Exception):
        raise
    except Exception as error:  # a third party's code may raise anything
        sentence = f"{item.name}: {type(error).__name__}: {error} ({location(error)})"
        raise pytest.fail.Exception(sentence, pytrace=False) from None
