"""Peak rates of GPUs, from which the share that training uses of them (MFU) follows.

Products of dense matrices, without sparsity: data sheets of NVIDIA from Ampere on name twice as much for sparse ones.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from hvdlm import hookimpl


class _Peak(NamedTuple):
    """TFLOP/s by the precision of the products; None: the device has no units for it."""

    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float


# By the pattern of the names that drivers give, whole. A slice of a GPU (MIG) has another name, and is unknown.
_PEAKS = {
    # NVIDIA H100 Tensor Core GPU Architecture, table 2 (SXM5, PCIe); data sheets of H100 (NVL), H200, GH200
    r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 (480GB|120GB|144G HBM3e)": _Peak(66.9, 494.7, 989.4, 989.4),
    r"NVIDIA H100 PCIe": _Peak(51.2, 378.0, 756.0, 756.0),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": _Peak(60.0, 417.5, 835.5, 835.5),
    # data sheet of HGX B200: a system of 8
    r"NVIDIA B200": _Peak(75.0, 1125.0, 2250.0, 2250.0),
    # NVIDIA A100 Tensor Core GPU Architecture, table 1
    r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe|NVIDIA A800-SXM4-80GB": _Peak(
        19.5, 156.0, 312.0, 312.0
    ),
    # data sheets of A30, A40, A10
    r"NVIDIA A30": _Peak(10.3, 82.0, 165.0, 165.0),
    r"NVIDIA A40": _Peak(37.4, 74.8, 149.7, 149.7),
    r"NVIDIA A10": _Peak(31.2, 62.5, 125.0, 125.0),
    # data sheets of L40S, L40, L4
    r"NVIDIA L40S": _Peak(91.6, 183.0, 362.0, 362.0),
    r"NVIDIA L40": _Peak(90.5, 90.5, 181.0, 181.0),
    r"NVIDIA L4": _Peak(30.3, 60.0, 121.0, 121.0),
    # NVIDIA Tesla V100 GPU Architecture, table 1; data sheets of V100 (PCIe), T4
    r"(Tesla )?V100-SXM2-(16|32)GB": _Peak(15.7, None, None, 125.0),
    r"(Tesla )?V100-PCIE-(16|32)GB": _Peak(14.0, None, None, 112.0),
    r"(NVIDIA )?(Tesla )?T4": _Peak(8.1, None, None, 65.0),
    # NVIDIA Ampere GA102 GPU Architecture, table 9; NVIDIA Ada GPU Architecture, table 2: sums in float32
    r"NVIDIA GeForce RTX 3090": _Peak(35.6, 35.6, 71.0, 71.0),
    r"NVIDIA GeForce RTX 4090": _Peak(82.6, 82.6, 165.2, 165.2),
    # data sheets of AMD Instinct MI300X and MI250X; of the latter, half: its two dies are two devices
    r"AMD Instinct MI300X": _Peak(163.4, 653.7, 1307.4, 1307.4),
    r"AMD Instinct MI250X( / MI250)?": _Peak(47.9, None, 191.5, 191.5),
}


class Peaks:
    """Plugin of every run that knows the devices of the table."""

    @hookimpl(trylast=True)
    def hvdlm_peak_flops(self, name: str, precision: str) -> float | None:
        """Return the peak rate of the device, in flop/s, or None where it isn't known."""
        peak = next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)
        teraflops = getattr(peak, precision, None)
        return None if teraflops is None else teraflops * 1e12
