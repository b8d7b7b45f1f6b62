"""The entry point of pytest: adds two options; the suite is imported only if they are given."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add ``--hvdlm-plugin`` and ``--hvdlm-config``."""
    group = parser.getgroup("hvdlm", "hvdlm: conformance of plugins")
    group.addoption(
        "--hvdlm-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="test the installed hvdlm plugin of this name against hvdlm's contracts; may be given several times",
    )
    group.addoption(
        "--hvdlm-config",
        action="append",
        default=[],
        metavar="NAME=FILE.yaml",
        help="options (YAML) that plugin NAME is tested with if it needs others than the defaults: a task's data.path",
    )


def pytest_configure(config: Any) -> None:
    """Add the suite if a plugin is named."""
    if config.getoption("hvdlm_plugin"):
        from hvdlm_testing import collection

        collection.add_suite(config)
