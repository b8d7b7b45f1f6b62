"""The built-in reporting of a run, as event plugins like any other."""

from __future__ import annotations

from hvdlm.config import Config


def default_plugins(config: Config) -> list[object]:
    """Return the event plugins that the options of ``log`` select."""
    from hvdlm.telemetry.metrics import Metrics
    from hvdlm.telemetry.progress import Progress
    from hvdlm.telemetry.tensorboard import TensorBoard

    plugins: list[object] = [Metrics(config)]
    if config.log.tensorboard:
        plugins.append(TensorBoard(config))
    if config.log.progress:
        plugins.append(Progress(config))
    return plugins
