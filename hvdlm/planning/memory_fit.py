"""Whether a rank's memory suffices, with head-room, and what is not counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.gradient_work import kept_bytes
from hvdlm.planning.hardware import Hardware
from hvdlm.protocols.types import Prediction

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FUSION = 128 * 2**20  # bytes: Horovod's default


@dataclass(frozen=True)
class Fit:
    """The memory of one rank's device, in bytes.

    Attributes:
        needed: by the model's state and activations, with what is reserved.
        available: of the device.
        reserved: what is needed beside the model, by what takes it; included in ``needed``.
        not_counted: what takes memory, too, of which no figure is known.
    """

    needed: float
    available: float
    reserved: dict[str, float] = field(default_factory=dict)
    not_counted: tuple[str, ...] = ()

    @property
    def headroom(self) -> float:
        """Bytes that are left; negative: that are missing."""
        return self.available - self.needed

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.headroom >= 0


def parse_bytes(text: str) -> float:
    """Return the bytes of a size like ``80GB`` (10^9) or ``40GiB`` (2^30).

    Raises:
        HvdlmError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match.group(2).upper() if match else "?"
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise HvdlmError(f"a memory size is a number and a unit, such as 80GB or 40GiB, not {shown(text)}.")
    return float(match.group(1)) * _UNITS[unit]


def fit(
    prediction: Prediction,
    config: Config,
    spec: ModelSpec,
    mesh: Mesh,
    hardware: Hardware | None,
    gpu_memory: float | None,
) -> Fit | None:
    """Return whether a rank's costs fit into ``gpu_memory`` bytes, or the hardware's; None where both are unknown."""
    available = gpu_memory if gpu_memory is not None else hardware.memory_bytes if hardware else None
    if available is None:
        return None
    reserved = dict(hardware.reserved_bytes) if hardware else {}
    if mesh.size > 1:
        fusion = config.communication.fusion_bytes
        reserved["fusion buffer"] = float(_FUSION if fusion is None else fusion)
        if kept := kept_bytes(config, mesh, prediction.memory["parameters"] - spec.frozen_bytes):
            reserved["exchange's vectors"] = kept
    names = () if hardware and hardware.reserved_bytes else ("CUDA context", "NCCL's buffers")
    needed = float(sum(prediction.memory.values())) + sum(reserved.values())
    return Fit(needed, available, reserved, (*names, "fragmentation", "evaluation"))
