"""The predicted seconds of a run's steps, by the measurements of its machine or a hardware file that it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.io import atomic_files
from hvdlm.planning.hardware import find_hardware, read_hardware
from hvdlm.planning.step_time import predict_time
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.training.run import Run
from hvdlm_planner.measured_steps import CAUSES


@dataclass(frozen=True)
class RunPrediction:
    """The prediction of a run.

    Attributes:
        seconds: of a step, by cause, and ``seconds``, their sum.
        name: of the hardware.
        path: its file; ``checksum``: the file's SHA-256.
        measured: whether plan --measure wrote it.
    """

    seconds: dict[str, float]
    name: str
    path: Path
    checksum: str
    measured: bool


def check(config: Config) -> None:
    """Check the hardware file that a run names, before its first step.

    Raises:
        HvdlmError: there is none, or it is wrong.
    """
    if config.log.hardware is not None:
        read_hardware(config.log.hardware)
