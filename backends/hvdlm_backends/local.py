"""Backend local: a single process without a transport, the default where no launcher started the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.diagnostics.flight_recorder import FlightRecorder
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.group import BlockingForms, Done, Group
from hvdlm.protocols.types import Traffic
from hvdlm_backends import environment


class AloneGroup(BlockingForms):
    """A group of one rank, in which every collective returns its input."""

    def __init__(self, rank: int = 0) -> None:
        self.ranks: tuple[int, ...] = (rank,)
        self.traffic: dict[str, Traffic] = {}

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Done:
        """Return a finished handle of the tensor."""
        return Done(tensor)

    def all_gather_async(self, tensor: Any, name: str) -> Done:
        """Return a finished handle of the tensor."""
        return Done(tensor)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Done:
        """Return a finished handle of the tensor."""
        return Done(tensor)

    def broadcast_async(self, tensor: Any, root: int, name: str) -> Done:
        """Return a finished handle of the tensor."""
        return Done(tensor)

    def all_to_all_async(self, tensor: Any, name: str) -> Done:
        """Return a finished handle of the tensor."""
        return Done(tensor)

    def barrier(self) -> None:
        """Return at once."""


class LocalWorld:
    """A world of one rank."""

    rank, size, local_size = 0, 1, 1
    transport = "none"

    def __init__(self, local_rank: int = 0) -> None:
        self.local_rank = local_rank
        self.recorder = FlightRecorder()

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of rank 0."""
        if tuple(ranks) != (0,):
            raise HvdlmError(f"backend local has rank 0 only, got a request for ranks {tuple(ranks)}.")
        return AloneGroup()

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the value."""
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Return [value]."""
        return [value]

    def broadcast_bytes(self, data: bytes | None, root: int) -> bytes:
        """Return the data."""
        return data or b""

    def agree(self, counts: Sequence[int]) -> Done:
        """Return a finished handle of the counts."""
        return Done(list(counts))

    def transfer_seconds(self) -> float | None:
        """Return None: a single rank transfers nothing."""
        return None

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def abort(self, code: int) -> None:
        """End this process."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def close(self) -> None:
        """Do nothing: there is no transport to close."""


class LocalBackend:
    """The backend ``local``."""

    name = "local"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of a single process; raise HvdlmError where a launcher started several."""
        environment.check_alone(launcher_env.detect())
        return (0, 1, 0, 1)

    def prepare(self, config: Config) -> int:
        """Set threads and settings in the environment; return the framework's threads per rank."""
        return environment.prepare(None, config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> LocalWorld:
        """Return a world of this process alone, on the device of the local rank that its launcher gave it."""
        launch = launcher_env.detect()
        return LocalWorld(launch.local_rank if launch else 0)


@hookimpl
def hvdlm_make_backend(name: str) -> LocalBackend | None:
    """Return the backend named ``local``."""
    return LocalBackend() if name == "local" else None
