"""Ranks that meet through Gloo, started by ``horovodrun --gloo``: no MPI is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.protocols.framework import Framework
from hvdlm_backends import environment, horovod


class GlooBackend:
    """The backend ``gloo``."""

    name = "gloo"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return what ``horovodrun --gloo`` tells; raise HvdlmError where another launcher started the ranks."""
        launch = environment.detect()
        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ:
            raise HvdlmError("backend gloo needs its rendezvous: start the run with horovodrun --gloo -np N.")
        return tuple(launch[1:]) if launch else (0, 1, 0, 1)  # type: ignore[return-value]

    def prepare(self, config: Config) -> int:
        """Set thread counts and settings before anything reads them; return framework threads per rank."""
        os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(30, round(2 * config.communication.timeout))))
        return environment.prepare(environment.detect(), config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> horovod.HorovodWorld:
        """Start Horovod on Gloo."""
        hvd, sets = horovod.start(
            framework.name, groups, environment.detect(), "Start all ranks with one horovodrun --gloo."
        )
        return horovod.HorovodWorld(hvd, sets)


@hookimpl
def hvdlm_make_backend(name: str) -> GlooBackend | None:
    """Answer to ``gloo``."""
    return GlooBackend() if name == "gloo" else None
