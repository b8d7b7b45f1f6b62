"""The predicted seconds of a run's steps, by the measurements of its machine or a hardware file that it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.io import atomic_files
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.training.run import Run
from hvdlm_planner import measured_files

if TYPE_CHECKING:
    from hvdlm.planning.closed_forms import Habits


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
        HvdlmError: there is none, it is wrong, or it has no rates of the run's framework and precision.
    """
    if config.log.hardware is not None:
        from hvdlm.planning.hardware import read_hardware

        read_hardware(config.log.hardware).rates_of(config.framework, config.train.precision)


def predict(run: Run) -> RunPrediction | None:
    """Return the prediction of a run; None where its machine was not measured, or its model's costs are unknown.

    Raises:
        HvdlmError: the hardware file is damaged, or has no rates of this framework and precision.
    """
    from hvdlm.planning.hardware import read_hardware
    from hvdlm.planning.step_time import predict_time

    config, path = run.config, hardware_path(run)
    if not path.is_file():
        return None
    checksum = atomic_files.sha256(path)
    hardware = read_hardware(path)
    moments = len(optimizer_state(config.train, plugins.find_optimizer(run.manager, config.train)))
    time = predict_time(config, run.spec, run.mesh, hardware, moments, habits_of(config))
    if time is None:
        return None
    seconds = {"seconds": time.seconds, **asdict(time)}
    return RunPrediction(seconds, hardware.name, path, checksum, bool(hardware.measured))


def hardware_path(run: Run) -> Path:
    """Return the hardware file that a run names, or else that of its machine, whether it exists or not."""
    config = run.config
    if config.log.hardware is not None:
        from hvdlm.planning.hardware import find_hardware

        return find_hardware(config.log.hardware)
    return measured_files.path_of(run.resolved.device, config.framework, config.train.precision, config.backend)


def habits_of(config: Config) -> Habits:
    """Return what a framework communicates in another way than PyTorch."""
    from hvdlm.planning.closed_forms import Habits

    return Habits(recomputes_all=config.framework == "tensorflow")
