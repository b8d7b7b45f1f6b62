"""Backend gloo: ranks that ``horovodrun --gloo`` started, without MPI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.framework import Framework
from hvdlm_backends import environment, horovod, rendezvous, shared_gpus


class GlooBackend:
    """The backend ``gloo``; ``nccl``: as that of ``nccl``, whose ranks connect through Gloo."""

    name = "gloo"

    def __init__(self, nccl: bool = False) -> None:
        self._nccl = nccl

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the launch shape; raise HvdlmError where ``horovodrun --gloo`` didn't start the ranks."""
        if not launcher_env.has_gloo_rendezvous():
            raise HvdlmError(
                "backend gloo needs the rendezvous of horovodrun: start the run with horovodrun --gloo -np N."
            )
        return environment.launch_shape(self.name)

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank."""
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
        limit = environment.after_watchdog(config.communication.timeout)
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(limit))
        return environment.prepare(launcher_env.detect(), config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> horovod.HorovodWorld:
        """Compare the ranks' settings, then start Horovod on Gloo."""
        launch = launcher_env.detect()
        check = None if launch is None else partial(rendezvous.check_settings, launch.rank)
        advice = "Start all ranks with one horovodrun --gloo."
        on_host = launch is not None and shared_gpus.select(framework, launch, self._nccl)
        hvd, sets = horovod.start(framework, groups, launch, advice, check)
        return horovod.HorovodWorld(framework, hvd, sets, on_host=on_host)


@hookimpl
def hvdlm_make_backend(name: str) -> GlooBackend | None:
    """Return the backend named ``gloo``."""
    return GlooBackend() if name == "gloo" else None
