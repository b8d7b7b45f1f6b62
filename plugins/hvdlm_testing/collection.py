"""Collection of the conformance suite by pytest: its files, and the parameters of its tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdlm.errors import HvdlmError
from hvdlm_testing.launcher import Launches
from hvdlm_testing.plugin_under_test import PluginUnderTest, find

_SUITE = Path(__file__).parent / "suite"


class Conformance:
    """The pytest plugin of one run, registered as ``hvdlm-conformance``."""

    def __init__(self, plugins: list[PluginUnderTest]) -> None:
        self.plugins = plugins
        self.launches = Launches(plugins)

    def pytest_report_header(self) -> str:
        """Return a line with the plugins and the number of ranks."""
        return f"hvdlm: conformance of {', '.join(p.name for p in self.plugins)}; {self.launches.describe()}"

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrize a test by the plugins that provide its feature, with their members and frameworks if it asks."""
        marker = metafunc.definition.get_closest_marker("provides")
        if marker is None:
            return
        (feature,) = marker.args
        names = [name for name in ("plugin", "member", "framework") if name in metafunc.fixturenames]
        rows = []
        for plugin in (p for p in self.plugins if feature == "everything" or p.provides(feature)):
            members = list(plugin.members(feature)) if "member" in names else [None]
            frameworks = self.launches.frameworks_of(plugin) if "framework" in names else [None]
            for member in members:
                for framework in frameworks:
                    ids = [plugin.name, *([member] if member else []), *([framework] if framework else [])]
                    values = {"plugin": plugin, "member": member, "framework": framework}
                    rows.append(pytest.param(*(values[name] for name in names), id="-".join(ids)))
        metafunc.parametrize(names, rows or [pytest.param(*(None for _ in names), id="none")])

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Deselect the tests of features that no plugin provides."""
        deselected = [
            item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("plugin", 1) is None
        ]
        if deselected:
            config.hook.pytest_deselected(items=deselected)
            items[:] = [item for item in items if item not in deselected]

    def pytest_collection_finish(self, session: Any) -> None:
        """Let launches make only the checks whose results the selected tests (``-k``, ``--last-failed``) ask for."""
        self.launches.selected = {check for item in session.items for check in self._checks_of(item)}

    def _checks_of(self, item: Any) -> Iterator[tuple[str, str, str, str]]:
        """Yield the framework, kind, plugin and member of each check whose result a test asks for."""
        marker = item.get_closest_marker("provides")
        kind = marker.kwargs.get("check") if marker else None
        if kind is None:
            return
        parameters = item.callspec.params
        plugin = parameters["plugin"]
        frameworks = [parameters["framework"]] if "framework" in parameters else self.launches.frameworks_of(plugin)
        for framework in frameworks:
            yield framework, kind, plugin.name, parameters.get("member") or ""


def add_suite(config: Any) -> None:
    """Add the suite's files to the run: in place of the default paths, or beside those on the command line."""
    try:
        plugins = find(config.getoption("hvdlm_plugin"), config.getoption("hvdlm_config"))
    except HvdlmError as error:
        raise pytest.UsageError(str(error)) from error
    config.addinivalue_line(
        "markers",
        "provides(feature, check=None): a test of plugins that provide this hook or collection, with a check on ranks",
    )
    # Of the command line's parser, whose version is not the plugin's concern.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:hvdlm.configuration.parsing")
    named = list(config.args) if config.args_source is config.ArgsSource.ARGS else []
    config.args = named + [str(path) for path in sorted(_SUITE.glob("test_*.py"))]
    config.pluginmanager.register(Conformance(plugins), "hvdlm-conformance")
