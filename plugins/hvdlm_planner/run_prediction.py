"""The predicted seconds of a run's steps, by the measurements of its machine or a hardware file that it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hvdlm.config import Config
from hvdlm.training.run import Run


@dataclass(frozen=True)
class RunPrediction:
    """The prediction of a run.

    Attributes:
        seconds: of a step, by cause, and ``seconds``, their sum.
        name: of the hardware.
        measurements: the checksum of the rates that it was made by.
        error_file: where its error is kept; None: it was not made by measurements.
    """

    seconds: dict[str, float]
    name: str
    measurements: str
    error_file: Path | None


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
    from hvdlm.planning.closed_forms import state_vectors
    from hvdlm.planning.step_time import predict_time
    from hvdlm_planner import grades
    from hvdlm_planner.advice import known_hardware
    from hvdlm_planner.habits import habits_of

    config, known = run.config, known_hardware(run.config.log.hardware, run.config)
    if known is None:
        return None
    path, hardware = known
    moments = state_vectors(run.manager, config)
    time = predict_time(config, run.spec, run.mesh, hardware, moments, habits_of(config))
    if time is None:
        return None
    kind = config.framework, config.train.precision
    error_file = grades.path_of(path, *kind) if hardware.measured else None
    seconds = {"seconds": time.seconds, **asdict(time)}
    return RunPrediction(seconds, hardware.name, grades.checksum(hardware, *kind), error_file)
