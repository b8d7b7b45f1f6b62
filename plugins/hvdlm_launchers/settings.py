"""Options of ``python -m hvdlm supervise``, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm_launchers import hosts


@dataclass
class Settings:
    """Supervision.

    Args:
        run: run folder; default: that of --log.run or --config in COMMAND
        max_failures: consecutive failures without progress before giving up
        backoff: seconds before a restart, doubled after every failure without progress
        max_backoff: maximum seconds before a restart
        host_discovery_script: program that prints a line host:slots for each host; fills {hosts} and {np} in COMMAND
        slots_per_host: slots of hosts that the script prints without a number
        probe: command that succeeds if {host} is reachable
        min_ranks: minimum number of ranks to start with; with fewer, it waits for hosts
        max_wait: maximum seconds to wait for hosts
        elastic: Horovod's elastic mode; not supported, use supervise itself
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
    """Check the settings and the command that is supervised.

    Raises:
        HvdlmError: the first mistake.
    """
    if settings.elastic:
        raise HvdlmError(
            "--elastic true is not offered: Horovod's elastic mode gives up the host of a rank that died, and ends "
            "where ranks form groups. Without it, supervise restarts a failed run on the hosts that are reachable."
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
            f"{command[0]} -c would not pass on the options that a restart adds: give the command itself, or a script "
            'that ends with "$@".'
        )
    fills = any("{np}" in word or "{hosts}" in word for word in command)
    if fills and settings.host_discovery_script is None:
        raise HvdlmError("{np} and {hosts} in the command need --host_discovery_script.")
    if settings.host_discovery_script is not None and not fills:
        raise HvdlmError("--host_discovery_script: the command holds neither {np} nor {hosts}, which it would fill.")
    # Not srun: inside a Slurm job step, supervise may start a launcher of its own.
    if launcher_env.several_ranks(launcher_env.OPEN_MPI, launcher_env.MPICH, launcher_env.HOROVODRUN):
        raise HvdlmError("supervise starts the launcher, not the other way round: ... supervise -- mpirun -np 2 ...")
