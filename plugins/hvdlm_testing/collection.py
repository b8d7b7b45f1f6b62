"""What pytest is told where a plugin is tested: which files, which plugins a test concerns, and the ranks' results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hvdlm_testing.launcher import Launches
from hvdlm_testing.plugin_under_test import Subject, find

from hvdlm.errors import HvdlmError

_SUITE = Path(__file__).parent / "suite"


class Conformance:
    """The pytest plugin that is registered for the run, as ``hvdlm-conformance``."""

    def __init__(self, subjects: list[Subject]) -> None:
        self.subjects = subjects
        self.launches = Launches(subjects)

    def pytest_report_header(self) -> str:
        """Say what is tested, and on how many ranks."""
        return f"hvdlm: conformance of {', '.join(s.name for s in self.subjects)}; {self.launches.describe()}"

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Hand a test every plugin that provides what it is about, each with every framework or member it asks for."""
        marker = metafunc.definition.get_closest_marker("provides")
        if marker is None:
            return
        (what,) = marker.args
        wanted = [name for name in ("subject", "member", "framework") if name in metafunc.fixturenames]
        rows = []
        for subject in (s for s in self.subjects if what == "everything" or s.provides(what)):
            members = list(subject.members(what)) if "member" in wanted else [None]
            kinds = self.launches.frameworks_of(subject) if "framework" in wanted else [None]
            for member in members:
                for kind in kinds:
                    ids = [subject.name, *([member] if member else []), *([kind] if kind else [])]
                    values = {"subject": subject, "member": member, "framework": kind}
                    rows.append(pytest.param(*(values[name] for name in wanted), id="-".join(ids)))
        metafunc.parametrize(wanted, rows or [pytest.param(*(None for _ in wanted), id="none")])

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out tests about what no plugin provides."""
        left = [
            item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("subject", 1) is None
        ]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


def add_suite(config: Any) -> None:
    """Add the suite's files to the run; alone, unless paths are named as well."""
    try:
        subjects = find(config.getoption("hvdlm_plugin"), config.getoption("hvdlm_config"))
    except HvdlmError as error:
        raise pytest.UsageError(str(error)) from error
    config.addinivalue_line("markers", "provides(what): a test of plugins that provide this hook or collection")
    named = list(config.args) if config.args_source is config.ArgsSource.ARGS else []
    config.args = named + [str(path) for path in sorted(_SUITE.glob("test_*.py"))]
    config.pluginmanager.register(Conformance(subjects), "hvdlm-conformance")
