"""Backend gloo: ranks that ``horovodrun --gloo`` started, without MPI."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.framework import Framework
from hvdlm_backends import environment, horovod


class GlooBackend:
    """The backend ``gloo``."""

    name = "gloo"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the launch shape; raise HvdlmError where ``horovodrun --gloo`` didn't start the ranks."""
        if not launcher_env.has_gloo_rendezvous():
            raise HvdlmError(
                "backend gloo needs the rendezvous of horovodrun: start the run with horovodrun --gloo -np N."
            )
        return launcher_env.launch_shape()

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank."""
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(30, round(2 * config.communication.timeout))))
        return environment.prepare(launcher_env.detect(), config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> horovod.HorovodWorld:
        """Start Horovod on Gloo."""
        hvd, sets = horovod.start(
            framework.name, groups, launcher_env.detect(), "Start all ranks with one horovodrun --gloo."
        )
        return horovod.HorovodWorld(hvd, sets)


@hookimpl
def hvdlm_make_backend(name: str) -> GlooBackend | None:
    """Return the backend named ``gloo``."""
    return GlooBackend() if name == "gloo" else None
