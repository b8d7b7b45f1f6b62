"""Results of two ranks in each framework: models, compressors, optimizers, exchanges, frameworks, tasks, backends."""

from __future__ import annotations

import numpy as np
import pytest

from hvdlm_testing.launcher import Launches, Result
from hvdlm_testing.plugin_under_test import PluginUnderTest
from hvdlm_testing.suite import fail


def _report(result: Result) -> None:
    fail(result.faults)
    if result.skipped:
        pytest.skip(result.skipped)


@pytest.mark.provides("models", check="models")
def test_a_model_trains_and_resumes(plugin: PluginUnderTest, member: str, framework: str, launches: Launches) -> None:
    _report(launches.of(framework, "models", plugin, member))


@pytest.mark.provides("compressors", check="compressors")
def test_a_compressor_meets_its_contract(
    plugin: PluginUnderTest, member: str, framework: str, launches: Launches
) -> None:
    _report(launches.of(framework, "compressors", plugin, member))


@pytest.mark.provides("optimizers", check="optimizers")
def test_an_optimizer_trains_and_resumes(
    plugin: PluginUnderTest, member: str, framework: str, launches: Launches
) -> None:
    _report(launches.of(framework, "optimizers", plugin, member))


@pytest.mark.provides("hvdlm_make_exchange", check="exchange")
def test_an_exchange_trains_and_resumes(plugin: PluginUnderTest, framework: str, launches: Launches) -> None:
    _report(launches.of(framework, "exchange", plugin))


@pytest.mark.provides("hvdlm_make_framework", check="framework")
def test_a_framework_computes_the_built_in_models(plugin: PluginUnderTest, framework: str, launches: Launches) -> None:
    _report(launches.of(framework, "framework", plugin))


@pytest.mark.provides("hvdlm_make_framework", check="framework_run")
def test_a_framework_runs_to_a_checkpoint_and_resumes(plugin: PluginUnderTest, launches: Launches) -> None:
    _report(launches.of(plugin.name, "framework_run", plugin))


@pytest.mark.provides("hvdlm_make_task", check="task_run")
def test_a_task_is_evaluated_and_resumes(plugin: PluginUnderTest, framework: str, launches: Launches) -> None:
    _report(launches.of(framework, "task_run", plugin))


@pytest.mark.provides("hvdlm_make_backend")
def test_a_backend_has_correct_collectives(plugin: PluginUnderTest, framework: str, launches: Launches) -> None:
    backend = plugin.implementation.hvdlm_make_backend(name=plugin.name)
    if backend is None or backend.name != plugin.name:
        pytest.fail(f"hvdlm_make_backend({plugin.name!r}) returns {backend!r}, expected a backend of that name.")
    if plugin.implementation.hvdlm_make_backend(name="another") is not None:
        pytest.fail(
            f"{plugin.name}: hvdlm_make_backend returns a backend for every name: return None unless it is its own."
        )
    _report(launches.of_backend(framework, plugin))


def _compare(plugin: PluginUnderTest, kind: str, launches: Launches, member: str = "", tolerance: float = 1e-4) -> None:
    """Fail if losses differ between frameworks by more than ``tolerance``."""
    results = {name: launches.of(name, kind, plugin, member) for name in launches.frameworks_of(plugin)}
    curves = {name: result.figures for name, result in results.items() if result.figures and not result.skipped}
    if len(curves) < 2:
        pytest.skip(f"it was trained in {', '.join(curves) or 'no framework'}: there is nothing to compare")
    (first, expected), *others = curves.items()
    for name, losses in others:
        if not np.allclose(expected, losses, atol=tolerance):
            pytest.fail(
                f"{member or plugin.name}: losses in {first} are {expected}, in {name} {losses}.", pytrace=False
            )


@pytest.mark.provides("models", check="models")
def test_a_model_has_the_same_losses_in_every_framework(
    plugin: PluginUnderTest, member: str, launches: Launches
) -> None:
    _compare(plugin, "models", launches, member)


@pytest.mark.provides("compressors", check="compressors")
def test_a_compressor_has_the_same_losses_in_every_framework(
    plugin: PluginUnderTest, member: str, launches: Launches
) -> None:
    # A value at the boundary of two quantisation levels may be rounded to either.
    _compare(plugin, "compressors", launches, member, 1e-3)


@pytest.mark.provides("optimizers", check="optimizers")
def test_an_optimizer_has_the_same_losses_in_every_framework(
    plugin: PluginUnderTest, member: str, launches: Launches
) -> None:
    _compare(plugin, "optimizers", launches, member)


@pytest.mark.provides("hvdlm_make_exchange", check="exchange")
def test_an_exchange_has_the_same_losses_in_every_framework(plugin: PluginUnderTest, launches: Launches) -> None:
    _compare(plugin, "exchange", launches)


@pytest.mark.provides("hvdlm_make_framework", check="framework")
def test_a_framework_has_the_same_losses_as_the_others(plugin: PluginUnderTest, launches: Launches) -> None:
    _compare(plugin, "framework", launches)
