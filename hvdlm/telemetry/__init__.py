"""What a run tells: event plugins like anybody else's."""

from __future__ import annotations

from hvdlm.config import Config


def default_plugins(config: Config) -> list[object]:
    """Return the event plugins that ``log`` asks for."""
    from hvdlm.telemetry.metrics import Metrics
    from hvdlm.telemetry.progress import Progress
    from hvdlm.telemetry.tensorboard import TensorBoard

    plugins: list[object] = [Metrics(config)]
    if config.log.tensorboard:
        plugins.append(TensorBoard(config))
    if config.log.progress:
        plugins.append(Progress(config))
    return plugins
