"""What two ranks found in each framework: models, compressors, exchanges, frameworks, tasks and backends."""

from __future__ import annotations

import numpy as np
import pytest
from hvdlm_testing.launcher import Found, Launches
from hvdlm_testing.plugin_under_test import Subject

from hvdlm.conformance.suite import fail


def _told(found: Found) -> None:
    fail(found.faults)
    if found.skipped:
        pytest.skip(found.skipped)


@pytest.mark.provides("models")
def test_a_model_trains_and_goes_on(subject: Subject, member: str, framework: str, launches: Launches) -> None:
    _told(launches.of(framework, "models", subject, member))


@pytest.mark.provides("compressors")
def test_a_compressor_keeps_its_promises(subject: Subject, member: str, framework: str, launches: Launches) -> None:
    _told(launches.of(framework, "compressors", subject, member))


@pytest.mark.provides("hvdlm_make_exchange")
def test_an_exchange_trains_and_goes_on(subject: Subject, framework: str, launches: Launches) -> None:
    _told(launches.of(framework, "exchange", subject))


@pytest.mark.provides("hvdlm_make_framework")
def test_a_framework_computes_the_built_in_models(subject: Subject, framework: str, launches: Launches) -> None:
    _told(launches.of(framework, "framework", subject))


@pytest.mark.provides("hvdlm_make_task")
def test_a_task_is_trained_and_evaluated(subject: Subject, framework: str, launches: Launches) -> None:
    _told(launches.of(framework, "task", subject))


@pytest.mark.provides("hvdlm_make_backend")
def test_a_backend_moves_what_it_is_given(subject: Subject, framework: str, launches: Launches) -> None:
    made = subject.plugin.hvdlm_make_backend(name=subject.name)
    if made is None or made.name != subject.name:
        pytest.fail(f"hvdlm_make_backend({subject.name!r}) makes {made!r}: it has to answer to the plugin's name.")
    if subject.plugin.hvdlm_make_backend(name="another") is not None:
        pytest.fail(f"{subject.name}: hvdlm_make_backend answers to every name: return None to others than its own.")
    _told(launches.of_backend(framework, subject))


def _alike(subject: Subject, kind: str, launches: Launches, member: str = "", tolerance: float = 1e-4) -> None:
    found = {name: launches.of(name, kind, subject, member) for name in launches.frameworks_of(subject)}
    curves = {name: one.figures for name, one in found.items() if one.figures and not one.skipped}
    if len(curves) < 2:
        pytest.skip(f"it was trained in {', '.join(curves) or 'no framework'}: there is nothing to compare")
    (first, one), *others = curves.items()
    for name, other in others:
        if not np.allclose(one, other, atol=tolerance):
            pytest.fail(f"{member or subject.name}: losses in {first} are {one}, in {name} {other}.", pytrace=False)


@pytest.mark.provides("models")
def test_a_model_has_the_same_losses_in_every_framework(subject: Subject, member: str, launches: Launches) -> None:
    _alike(subject, "models", launches, member)


@pytest.mark.provides("compressors")
def test_a_compressor_has_the_same_losses_in_every_framework(subject: Subject, member: str, launches: Launches) -> None:
    # A value on the border of two levels falls to either side.
    _alike(subject, "compressors", launches, member, 1e-3)


@pytest.mark.provides("hvdlm_make_exchange")
def test_an_exchange_has_the_same_losses_in_every_framework(subject: Subject, launches: Launches) -> None:
    _alike(subject, "exchange", launches)


@pytest.mark.provides("hvdlm_make_framework")
def test_a_framework_has_the_same_losses_as_the_others(subject: Subject, launches: Launches) -> None:
    _alike(subject, "framework", launches)
