"""Published figures that the machines' files were not fitted on, predicted."""

from __future__ import annotations

import sys

import pytest

from hvdlm.planning.hardware import read_hardware
from launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import published_systems as published

H100 = read_hardware("h100")


def test_the_h100_file_is_fitted_on_one_point_alone() -> None:
    fitted = published.fitted(H100).rates[0].product_efficiency
    assert H100.rates[0].product_efficiency == pytest.approx(fitted, abs=5e-4)
    assert published.tokens_per_second(H100, 8) == pytest.approx(5762, rel=0.001)
    assert H100.speed_deviation == pytest.approx(published.speed_deviation(), abs=5e-4)


def test_lost_efficiency_from_8_to_128_gpus_is_predicted() -> None:
    predicted = 1 - published.tokens_per_second(H100, 128) / published.tokens_per_second(H100, 8)
    assert 1 / 1.5 < predicted / (1 - 5605 / 5762) < 1.5


@pytest.mark.parametrize("case", published.MEGATRON, ids=lambda case: case.name)
def test_utilization_of_megatron_is_predicted(case: published.MegatronCase) -> None:
    assert published.megatron_mfu(H100, case) == pytest.approx(case.teraflops * 1e12 / published.PEAK, rel=0.15)


def test_predictions_are_better_than_a_constant_utilization() -> None:
    constant = published.torchtitan_mfu(5762)
    measured = [case.teraflops * 1e12 / published.PEAK for case in published.MEGATRON]
    predicted = [published.megatron_mfu(H100, case) for case in published.MEGATRON]
    worst = max(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    assert 2 * worst < max(abs(constant / m - 1) for m in measured)


@pytest.mark.parametrize("name", published.IMAGES)
def test_horovods_efficiency_on_512_gpus_is_predicted(name: str) -> None:
    efficiency = published.horovod_efficiency(read_hardware("p100"), name)
    assert efficiency == pytest.approx(published.IMAGES[name][2], abs=0.10)
