"""What all ranks have decided, as a checkpoint keeps it: equal on all of them, and replayed by a resumed run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm_auto.decisions import BucketCost, Candidate, Line

ENTRY = "auto/decisions"
"""Its name in ``Exchange.state()``: uint8 ``[n]``, JSON."""


@dataclass
class Decision:
    """From ``step`` (the first is 0) on, gradients are summed by ``method``, for this ``reason``."""

    step: int
    method: str
    reason: str


@dataclass
class Trial:
    """Methods that take turns of ``steps`` steps from step ``first`` on; the fastest is kept.

    Attributes:
        turns: the methods, turn by turn.
        seconds: of a step, for the turns that are over.
    """

    first: int
    steps: int
    turns: list[str]
    seconds: list[float] = field(default_factory=list)


@dataclass
class DecisionLog:
    """The state of ``communication.auto``.

    Attributes:
        about: what a resumed run compares: ranks, transport, framework, limits.
        decisions: in their order.
        wire: seconds of collectives, by ``operation dtype``.
        candidates: with the wire as it was measured last.
        collectives: of every candidate and bucket, (kind, bytes, round), from which its wire's seconds follow.
        computed: by method, what an element of a bucket takes to start and to finish, in seconds.
        forward: seconds of a micro-batch's forward pass; ``step``: of a step without communication.
        expected: seconds of a step, and of waiting for communication in it, that are compared with newer ones.
        residuals: by method, the least ratio of error feedback to the gradient since it was chosen.
        banned: methods whose error feedback has grown.
        measured: the first step after the wire was measured.
        settled: whether methods have been tried on this wire.
    """

    about: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    wire: dict[str, Line] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    collectives: dict[str, list[list[tuple[str, float, int]]]] = field(default_factory=dict)
    computed: dict[str, list[float]] = field(default_factory=dict)
    forward: float = 0.0
    step: float = 0.0
    expected: tuple[float, float] | None = None
    residuals: dict[str, float] = field(default_factory=dict)
    banned: list[str] = field(default_factory=list)
    measured: int = 0
    settled: bool = False
    trial: Trial | None = None
    active: str = "dense"

    def method(self, step: int) -> str:
        """Return the method of ``step``."""
        return next((d.method for d in reversed(self.decisions) if d.step <= step), "dense")

    def add(self, step: int, method: str, reason: str) -> Decision:
        """Decide; the decision is returned."""
        self.decisions.append(Decision(step, method, reason))
        return self.decisions[-1]

    def state(self) -> dict[str, np.ndarray]:
        """Return the entry of a checkpoint; none before the first decision."""
        if not self.decisions:
            return {}
        text = json.dumps(dataclasses.asdict(self), allow_nan=False)
        return {ENTRY: np.frombuffer(text.encode(), np.uint8).copy()}


def read_log(array: np.ndarray) -> DecisionLog:
    """Return the log of a checkpoint's entry.

    Raises:
        HvdlmError: it is damaged.
    """
    try:
        values = json.loads(array.tobytes().decode())
        values["decisions"] = [Decision(**entry) for entry in values["decisions"]]
        values["wire"] = {kind: Line(**line) for kind, line in values["wire"].items()}
        values["candidates"] = [_candidate(entry) for entry in values["candidates"]]
        values["trial"] = Trial(**values["trial"]) if values["trial"] else None
        values["expected"] = tuple(values["expected"]) if values["expected"] else None
        return DecisionLog(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise HvdlmError(
            f"the checkpoint's exchange/{ENTRY} is damaged ({error}): resume from an earlier checkpoint, or without "
            "communication.auto."
        ) from error


def _candidate(entry: dict[str, Any]) -> Candidate:
    return Candidate(entry["name"], entry["gap"], tuple(BucketCost(**bucket) for bucket in entry["buckets"]))
