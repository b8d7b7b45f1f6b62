"""Injected conditions: ``--backend threads --ranks N --plugins '[injected]' --injected.file FILE``.

Slow links, slow ranks, late ranks and faults, from a YAML file (``injected_conditions.py``), between ranks that are
threads of one process. Delays are sleeps, and change no result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdlm import hookimpl, plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env, rank_context
from hvdlm_backends.injected_conditions import Conditions, applies, read_conditions
from hvdlm_backends.injected_links import Links
from hvdlm_backends.threads_launch import Launch
from hvdlm_backends.threads_network import Call, RanksEnded

_MESSAGES = ("gather", "broadcast_bytes", "agree")  # host-side messages, which aren't counted as collectives
_POLL_SECONDS = 0.1


class InjectedError(Exception):
    """The error of a rank that an injected fault ends."""


class InjectedConditions:
    """Implements ``Injection``.

    Args:
        conditions: what to inject.
        size: the number of ranks.
    """

    def __init__(self, conditions: Conditions, size: int) -> None:
        self._conditions = conditions
        self._links = Links(conditions)
        self._position = [(0, 0)] * size  # by rank: the step, and the collectives started in it
        self._computed = [0.0] * size  # by rank: the processor time of its thread, up to its last collective

    def begin_step(self, rank: int, step: int, check: Callable[[], None]) -> None:
        """Raise an error, end or hang where a fault says so; sleep where the rank is slow.

        Raises:
            InjectedError: the fault of this step.
        """
        for fault in self._conditions.faults:
            if (fault.rank, fault.step) == (rank, step):
                _fail(fault.kind, rank, step, check)
        slow = [s for s in self._conditions.slow if rank in s.ranks and applies(s, step)]
        time.sleep(sum(s.seconds for s in slow))

    def arrive(self, call: Call) -> None:
        """Sleep where the rank computes slowly, or comes late to this collective."""
        rank = call.rank
        now = time.thread_time()
        slow = [s for s in self._conditions.slow if rank in s.ranks and applies(s, call.step)]
        seconds = (now - self._computed[rank]) * sum(s.factor - 1.0 for s in slow)
        self._computed[rank] = now
        if call.operation not in _MESSAGES:
            step, count = self._position[rank]
            self._position[rank] = position = call.step, (count if step == call.step else 0) + 1
            seconds += sum(
                n.seconds for n in self._conditions.late if (n.rank, n.step, n.collective) == (rank, *position)
            )
        time.sleep(max(0.0, seconds))

    def complete_at(self, call: Call, began: float) -> float:
        """Return when the collective is complete."""
        return self._links.complete_at(call, began)


def _fail(kind: str, rank: int, step: int, check: Callable[[], None]) -> None:
    if kind == "error":
        raise InjectedError(f"injected fault: rank {rank} fails at step {step}")
    if kind == "exit":
        raise RanksEnded(1)
    while True:  # a rank that hangs; it ends with the others
        time.sleep(_POLL_SECONDS)
        check()


@dataclass
class InjectedOptions:
    """Conditions that are injected between ranks that are threads.

    Args:
        file: YAML file of slow links, slow and late ranks, and faults
    """

    file: str | None = None


@hookimpl
def hvdlm_options() -> Mapping[str, type]:
    """Return the options of the section injected."""
    return {"injected": InjectedOptions}


@hookimpl
def hvdlm_check(config: Config) -> None:
    """Check that there is a file.

    Raises:
        HvdlmError: there is none.
    """
    if config.own("injected", InjectedOptions).file is None:
        raise HvdlmError("plugin injected needs the file of its conditions: --injected.file conditions.yaml.")


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Inject the file's conditions into this rank's world.

    Raises:
        HvdlmError: the file is wrong, or the ranks aren't threads.
    """
    options, own = config.own("injected", InjectedOptions), rank_context.current()
    if options.file is None:
        return
    path = Path(options.file)
    if own is not None and isinstance(own.launch, Launch):
        network = own.launch.network
        conditions = rank_context.once(("injected", str(path)), lambda: read_conditions(path, network.size))
        framework = plugins.load([config.framework]).get_plugin(config.framework)
        slow = any(s.factor > 1.0 for s in conditions.slow)
        if slow and not getattr(framework, "COMPUTES_IN_CALLER", False):
            raise HvdlmError(
                f"injected.file {path}: slow[].factor needs the processor time of each rank, and {config.framework} "
                "computes in threads that all ranks share: give slow[].seconds."
            )
        network.injection = rank_context.once("injection", lambda: InjectedConditions(conditions, network.size))
    elif launcher_env.launch_shape()[1] > 1:
        raise HvdlmError("plugin injected delays ranks that are threads only: --backend threads --ranks N.")
