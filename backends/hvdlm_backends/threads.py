"""Backend threads: ranks are threads of one process, with collectives in memory: ``--backend threads --ranks N``.

For debugging many ranks on one machine, and for tests: the ranks run the code that they would run under MPI.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from hvdlm import hookimpl, plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env, rank_context
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm_backends import environment
from hvdlm_backends.threads_launch import Launch
from hvdlm_backends.threads_network import Injection
from hvdlm_backends.threads_world import ThreadsWorld

MOST_RANKS = 4096


class ThreadsBackend:
    """The backend ``threads``."""

    name = "threads"

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the threads that were started.

        Raises:
            HvdlmError: none were.
        """
        if rank_context.current() is None:
            raise HvdlmError("backend threads needs the number of ranks: --backend threads --ranks 4, for example.")
        return launcher_env.launch_shape()

    def prepare(self, config: Config) -> int:
        """Set thread counts in the environment; return the framework's threads per rank.

        Raises:
            HvdlmError: a setting is Horovod's.
        """
        # A GPU's backward passes run in one thread of the process, in which ranks would wait for each other.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        environment.refuse_horovod_settings(config, self.name)
        return environment.set_threads(launcher_env.detect(), config)

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Return this thread's world, once all ranks have come."""
        own = rank_context.current()
        assert own is not None and isinstance(own.launch, Launch)
        world = ThreadsWorld(own.launch.network, own.rank, groups, framework, own.launch.end)
        world.wait_for_start()
        return world

    def run_ranks(self, ranks: int, function: Callable[[], Any]) -> list[Any]:
        """Return what ``function()`` returns in each of ``ranks`` threads.

        Raises:
            BaseException: that of the rank which failed first; the others are ended.
        """
        return Launch(checked(str(ranks))).run(lambda _: function())


def checked(ranks: str) -> int:
    """Return the number of ranks to start."""
    if not (ranks.isascii() and ranks.isdigit() and 0 < int(ranks[:8]) <= MOST_RANKS):
        raise HvdlmError(f"--ranks: got {shown(repr(ranks))}, expected a number of threads from 1 to {MOST_RANKS}.")
    launch = launcher_env.detect()
    if launch and launch.size > 1:
        raise HvdlmError(
            f"--ranks starts ranks as threads of one process, but {launch.launcher} started {launch.size} "
            "processes: leave one of the two out."
        )
    return int(ranks)


def run_ranks(
    size: int,
    function: Callable[[World], Any],
    framework: str,
    groups: Sequence[tuple[int, ...]] = (),
    injection: Injection | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """Return what ``function(world)`` returns on each of ``size`` ranks, which are threads of this process.

    Args:
        size: the number of ranks.
        function: called with each rank's world, in the rank's thread.
        framework: whose tensors are sent.
        groups: the groups of two ranks or more that ``function`` uses besides that of all ranks.
        injection: delays and faults.
        timeout: seconds that the whole may take.

    Raises:
        TimeoutError: it took longer.
        BaseException: that of the rank which failed first; the others are ended.
    """
    made = plugins.make(plugins.load([framework]), "framework", framework)
    launch = Launch(size, injection)

    def run_rank(rank: int) -> Any:
        world = ThreadsWorld(launch.network, rank, groups, made, launch.end)
        result = function(world)
        world.close()
        return result

    return launch.run(run_rank, timeout)


@hookimpl
def hvdlm_make_backend(name: str) -> ThreadsBackend | None:
    """Return the backend named ``threads``."""
    return ThreadsBackend() if name == "threads" else None
