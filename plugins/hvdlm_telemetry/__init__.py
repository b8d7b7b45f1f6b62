"""What every run reports: its progress, its metrics as JSON lines, and TensorBoard; event plugins like any other."""

from __future__ import annotations

from hvdlm.config import Config


def observers(config: Config) -> list[object]:
    """Return the event plugins that the options of ``log`` select, and those that every run has."""
    from hvdlm_telemetry.changed_rate import ChangedRate
    from hvdlm_telemetry.computation import Computation
    from hvdlm_telemetry.metrics import Metrics
    from hvdlm_telemetry.peaks import Peaks
    from hvdlm_telemetry.progress import Progress
    from hvdlm_telemetry.tensorboard import TensorBoard

    plugins: list[object] = [Metrics(config)]
    if config.log.tensorboard:
        plugins.append(TensorBoard(config))
    if config.log.progress:
        plugins.append(Progress(config))
    plugins += [ChangedRate(), Peaks(), Computation()]  # the last is called first
    return plugins
