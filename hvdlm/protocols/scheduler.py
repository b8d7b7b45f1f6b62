"""Writers of job files for the scheduler of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hvdlm.config import Config


class Scheduler(Protocol):
    """Writes job files for one scheduler: a module or an object with these two names."""

    @property
    def CLIENT(self) -> Sequence[str]:
        """The command that submits a job file read from standard input."""

    def write(self, job: Any, arguments: Sequence[str], config: Config) -> str:
        """Return the job file of a run: ``arguments`` of train, on the ranks of ``job``.

        ``job``: an ``hvdlm_launchers.schedulers.job.Job``; ``config``: the parsed ``arguments``. The job has to run
        ``job.setup`` first, send the run SIGUSR1 ``job.save_seconds`` before the time limit, train with
        ``--checkpoint.resume auto``, and be requeued if the run ends with code 75.
        ``hvdlm_launchers.schedulers.script`` contains the shell code for this.

        Raises:
            HvdlmError: the scheduler can't provide what the job asks for.
        """
