"""What supervise is asked to do: its settings, and the command that it supervises."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm_launchers import hosts

from hvdlm.configuration.parsing import read_yaml
from hvdlm.errors import HvdlmError


@dataclass
class Settings:
    """How a run is supervised.

    Args:
        run: the run's folder; default: what --log.run or --config in the command say
        max_failures: failures in a row without progress after which it gives up
        backoff: seconds before the next attempt, doubled with every failure without progress
        max_backoff: most seconds before the next attempt
        host_discovery_script: program that prints a line host:slots for each host; fills {hosts} and {np} in COMMAND
        slots_per_host: slots of hosts that the script prints without
        probe: command that ends with code 0 where {host} answers
        min_ranks: with fewer the run is not started, hosts are waited for
        max_wait: seconds to wait for hosts
        elastic: Horovod's elastic mode; refused, because supervise does what it is for
    """

    run: str | None = None
    max_failures: int = 3
    backoff: float = 5.0
    max_backoff: float = 300.0
    host_discovery_script: str | None = None
    slots_per_host: int | None = None
    probe: str = hosts.PROBE
    min_ranks: int = 1
    max_wait: float = 600.0
    elastic: bool = False


def check(settings: Settings, command: list[str]) -> None:
    """Check what was given.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    if settings.elastic:
        raise HvdlmError(
            "--elastic true is not offered: Horovod's elastic mode gives up the host of a rank that died, and ends "
            "where ranks form groups. Without it, supervise starts a failed run again on the hosts that answer."
        )
    for name in ("max_failures", "slots_per_host", "min_ranks"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise HvdlmError(f"--{name}: got {value}, expected 1 or more.")
    for name in ("backoff", "max_backoff", "max_wait"):
        value = getattr(settings, name)
        if not 0 <= value < float("inf"):
            raise HvdlmError(f"--{name}: got {value}, expected seconds, 0 or more.")
    _check_command(settings, command)


def _check_command(settings: Settings, command: list[str]) -> None:
    if not command:
        raise HvdlmError("no command: write python -m hvdlm supervise [OPTIONS] -- mpirun -np 2 python -m hvdlm ...")
    if Path(command[0]).name in ("sh", "bash") and "-c" in command:
        raise HvdlmError(
            f"{command[0]} -c would not hand on the options that a restart adds: give the command itself, or a script "
            'that ends with "$@".'
        )
    fills = any("{np}" in word or "{hosts}" in word for word in command)
    if fills and settings.host_discovery_script is None:
        raise HvdlmError("{np} and {hosts} in the command need --host_discovery_script.")
    if settings.host_discovery_script is not None and not fills:
        raise HvdlmError("--host_discovery_script: the command holds neither {np} nor {hosts}, which it would fill.")
    if any(os.environ.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "HOROVOD_SIZE")):
        raise HvdlmError("supervise starts the launcher, not the other way round: ... supervise -- mpirun -np 2 ...")


def train_arguments(command: list[str]) -> list[str] | None:
    """Return what follows ``-m hvdlm [train]``, None where that is not what is run."""
    places = [i for i, pair in enumerate(itertools.pairwise(command)) if pair == ("-m", "hvdlm")]
    if not places:
        return None
    rest = command[places[0] + 2 :]
    if rest and not rest[0].startswith("-"):
        return rest[1:] if rest[0] == "train" else None
    return rest


def given(command: list[str], key: str) -> str | None:
    """Return the value that ``command`` gives the option ``key`` ("log.run"), itself or in a --config file.

    Raises:
        HvdlmError: such a file can't be read.
    """
    found = None
    for index, word in enumerate(command):
        name, sign, value = word.partition("=")
        if not sign:
            value = command[index + 1] if index + 1 < len(command) else ""
        if name == f"--{key}":
            found = value
        elif name == "--config":
            found = _in_file(Path(value), key) or found
    return found


def _in_file(path: Path, key: str) -> str | None:
    found: Any = read_yaml(path)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return None if found is None else str(found)
