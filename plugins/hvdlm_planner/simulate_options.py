"""Options of ``plan --simulate``: disturbances, failures and saves."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.planning.simulator import Disturbances

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365.25 * 86400.0}


@dataclass(frozen=True)
class SimulateOptions:
    """What is simulated, in seconds.

    Attributes:
        steps: that are simulated for the mean seconds of a step.
        disturbances: with ``speed_deviation`` None: that of the hardware.
        rank_mtbf, node_mtbf: mean time between failures of one rank and of one node; infinite: they don't fail.
        restart: from a failure until training continues.
        save: for which a save pauses training; None: by the hardware.
        write: after the pause, until the checkpoint is complete.
        scaling: JSON file for the figures of 8 to 4,096 ranks; None: none is written.
    """

    steps: int
    disturbances: Disturbances
    speed_deviation: float | None
    rank_mtbf: float
    node_mtbf: float
    restart: float
    save: float | None
    write: float
    scaling: Path | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of plan."""
    group = parser.add_argument_group(
        "simulation", "Simulate many ranks with --hardware: stragglers, jitter, failures. Durations: 90s, 5min, 2h, 3y."
    )
    group.add_argument("--simulate", action="store_true", help="simulate the run, and 8 to 4,096 ranks of the same")
    group.add_argument("--simulated_steps", metavar="N", help="steps of which the mean is taken; default: 500")
    group.add_argument(
        "--jitter", metavar="SHARE", help="standard deviation of a rank's seconds in a step, relative to their mean"
    )
    group.add_argument(
        "--jitter_distribution", metavar="NAME", default="lognormal", help="lognormal (default) or gamma"
    )
    group.add_argument("--stragglers", metavar="SHARE", help="share of the ranks that are always slow")
    group.add_argument("--straggler_rate", metavar="SHARE", help="share of its steps in which any rank is slow")
    group.add_argument(
        "--straggler_factor", metavar="FACTOR", help="seconds of slow ranks relative to others; default: 1.5"
    )
    group.add_argument(
        "--speed_deviation",
        metavar="SHARE",
        help="standard deviation of the devices' speeds, relative to their mean; default: that of the hardware file",
    )
    group.add_argument("--rank_mtbf", metavar="TIME", help="mean time between failures of one rank; default: none")
    group.add_argument("--node_mtbf", metavar="TIME", help="mean time between failures of one node; default: none")
    group.add_argument(
        "--restart", metavar="TIME", help="from a failure until training continues, loading included; default: 5min"
    )
    group.add_argument(
        "--save", metavar="TIME", help="for which a save pauses training; default: by the hardware's save rate"
    )
    group.add_argument(
        "--save_write", metavar="TIME", help="after the pause, until the checkpoint is complete; default: 0s"
    )
    group.add_argument("--scaling", metavar="FILE", help="JSON file for the curves, which hvdlm report draws")


def read_options(values: argparse.Namespace, seed: int) -> SimulateOptions:
    """Return the options that the command line gives.

    Raises:
        HvdlmError: the first that is wrong.
    """
    if values.jitter_distribution not in ("lognormal", "gamma"):
        raise HvdlmError(
            f"--jitter_distribution: got {shown(values.jitter_distribution)}, expected lognormal or gamma."
        )
    disturbances = Disturbances(
        straggler_share=_number("stragglers", values.stragglers, 0.0, most=1.0),
        straggler_rate=_number("straggler_rate", values.straggler_rate, 0.0, most=1.0),
        straggler_factor=_number("straggler_factor", values.straggler_factor, 1.5, least=1.0),
        jitter=_number("jitter", values.jitter, 0.0, most=10.0),
        distribution=values.jitter_distribution,
        seed=seed,
    )
    steps = _number("simulated_steps", values.simulated_steps, 500.0, least=2, most=1e6)
    deviation = None
    if values.speed_deviation is not None:
        deviation = _number("speed_deviation", values.speed_deviation, 0.0, most=1.0)
    return SimulateOptions(
        int(steps),
        disturbances,
        deviation,
        _time("rank_mtbf", values.rank_mtbf, math.inf),
        _time("node_mtbf", values.node_mtbf, math.inf),
        _time("restart", values.restart, 300.0, zero=True),
        _time("save", values.save, 0.0, zero=True) if values.save else None,
        _time("save_write", values.save_write, 0.0, zero=True),
        Path(values.scaling) if values.scaling else None,
    )


def _number(name: str, text: str | None, default: float, least: float = 0.0, most: float = 1e9) -> float:
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise HvdlmError(f"--{name}: got {shown(text)}, expected a number from {least:g} to {most:g}.")
    return value


def _time(name: str, text: str | None, default: float, zero: bool = False) -> float:
    if text is None:
        return default
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(s|min|h|d|y)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if match is None or not (zero or seconds):
        raise HvdlmError(f"--{name}: got {shown(text)}, expected a duration such as 90s, 5min, 2h, 30d or 3y.")
    return seconds


def duration(seconds: float) -> str:
    """Return seconds as a duration with a unit: 12.3 s, 4.5 min, 2.1 h, 30 d."""
    size, unit = max((size, unit) for unit, size in _UNITS.items() if size <= max(abs(seconds), 1.0))
    return f"{seconds / size:.3g} {unit}"
