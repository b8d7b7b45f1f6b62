"""The built-in schedulers: Slurm, PBS, LSF and Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvdlm import hookimpl

if TYPE_CHECKING:
    from hvdlm.protocols.scheduler import Scheduler


@hookimpl
def hvdlm_schedulers() -> Mapping[str, Scheduler]:
    """Return the modules that write the job files of each scheduler."""
    from hvdlm_launchers.schedulers import kubernetes, lsf, pbs, slurm

    return {"slurm": slurm, "pbs": pbs, "lsf": lsf, "kubernetes": kubernetes}
