"""Measured seconds of a rank's steps, by cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from hvdlm.protocols.types import StepResult

CAUSES = ("compute", "communication", "bubble", "data", "save")
"""What a step's time is spent on; the seconds of these add up to those of the step."""

WARMUP = 2
"""First steps of a process that are left out: frameworks build graphs and allocate memory in them."""

_KEPT = 1000  # the last blocks of steps of which medians are computed


class MeasuredSteps:
    """Medians over the steady steps of this rank.

    Steps between two synchronisations of local SGD or DiLoCo form one block, whose mean counts: of single steps, the
    median would leave out what the synchronisation takes. ``unsteady``: first steps to leave out.
    """

    def __init__(self, unsteady: int = WARMUP) -> None:
        self._unsteady = max(unsteady, WARMUP)
        self._blocks: deque[tuple[float, ...]] = deque(maxlen=_KEPT)
        self._block: list[tuple[float, ...]] = []
        self._saves: list[float] = []
        self._seconds = 0.0  # of all steady steps
        self.steps = 0

    def add(self, result: StepResult, seconds: float, ends_block: bool) -> bool:
        """Add a step, which took ``seconds``; return whether it was the last unsteady one."""
        self.steps += 1
        if self.steps > self._unsteady:
            self._seconds += seconds
            waited = max(0.0, result.comm_seconds - result.idle_seconds)
            self._block.append((seconds, waited, result.idle_seconds, result.data_seconds))
            if ends_block:
                self._blocks.append(tuple(sum(values) / len(self._block) for values in zip(*self._block, strict=True)))
                self._block = []
        return self.steps == self._unsteady

    def add_save(self, seconds: float) -> None:
        """Add a checkpoint, which blocked training for ``seconds``."""
        self._saves.append(seconds)

    @property
    def blocks(self) -> int:
        """Number of blocks that the medians are computed of."""
        return len(self._blocks)

    @property
    def steady(self) -> int:
        """Number of steps after the first, unsteady ones."""
        return max(0, self.steps - self._unsteady)

    def by_cause(self, save_every: int, tensor_seconds: float = 0.0) -> dict[str, float] | None:
        """Return the seconds of a step by cause, and ``seconds``, their sum; None without a steady step.

        Args:
            save_every: steps between checkpoints, over which the median of their seconds is spread; 0: none during
                training.
            tensor_seconds: of all steady steps, in which this rank waited for collectives between tensor ranks; the
                median step has the same share of them.
        """
        if not self._blocks:
            return None
        step, waited, bubble, data = (median(values) for values in zip(*self._blocks, strict=True))
        save = median(self._saves) / save_every if self._saves and save_every else 0.0
        waited += step * tensor_seconds / self._seconds if self._seconds else 0.0
        compute = max(0.0, step - waited - bubble - data)
        causes = dict(zip(CAUSES, (compute, waited, bubble, data, save), strict=True))
        return {"seconds": sum(causes.values()), **causes}


def slowest(ranks: Sequence[Mapping[str, float] | None]) -> int | None:
    """Return the rank that computes longest, for which the others wait; None where one has no steady step."""
    if not ranks or None in ranks:
        return None
    return max(range(len(ranks)), key=lambda rank: (ranks[rank] or {})["compute"])
