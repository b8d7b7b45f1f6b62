"""Which method hides behind the backward pass: predicted seconds, and choices that follow from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdlm.planning.overlap import Slowdown, Task, run

HIDDEN = 0.02  # share of a step for which communication may be exposed and still count as hidden
EQUAL = 0.02  # share by which two methods' seconds may differ and still count as equal
CLOSE = 2.0  # methods whose predicted steps take at most this many times as long as the best's are tried in training
MOST_TRIED = 4


@dataclass(frozen=True)
class Line:
    """The seconds of a collective: ``latency`` (s) and ``per_byte`` (s) of what a rank hands over."""

    latency: float
    per_byte: float

    def seconds(self, size: float) -> float:
        """Return the seconds for ``size`` bytes."""
        return self.latency + size * self.per_byte


@dataclass(frozen=True)
class BucketCost:
    """What a method takes for one bucket, in seconds.

    Attributes:
        start: of computation when the bucket is complete (compressing, copying).
        wire: of the collectives that begin then.
        later: of further rounds' collectives, after the backward pass.
        finish: of computation when the sums have arrived.
    """

    start: float
    wire: float
    later: float = 0.0
    finish: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A method, its gap of the loss (nats, 0: lossless), and what it takes for every bucket of the model."""

    name: str
    gap: float
    buckets: tuple[BucketCost, ...]


@dataclass(frozen=True)
class Backward:
    """The step that has to hide the communication.

    Attributes:
        seconds: of the last micro-batch's backward pass.
        step: seconds of a step without communication.
        shares: of the backward pass before each bucket is complete, from when the one before was; their sum is 1.
    """

    seconds: float
    step: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Predicted:
    """A step by a candidate: ``seconds``, and those of them that its communication adds (``added``)."""

    candidate: Candidate
    seconds: float
    added: float


@dataclass(frozen=True)
class Choice:
    """The method to train with, why, and the methods that are to be tried before (none: the choice is clear)."""

    name: str
    reason: str
    tried: tuple[str, ...] = ()


def predict(candidate: Candidate, backward: Backward) -> Predicted:
    """Return the seconds of a step, in which buckets travel while the backward pass continues."""
    pairs = zip(backward.shares, candidate.buckets, strict=True)
    tasks = [Task(backward.seconds * share + bucket.start, 0.0, then=bucket.wire) for share, bucket in pairs]
    ran = run(tasks, Slowdown())
    added = ran.end + ran.exposed - backward.seconds
    added += sum(bucket.later + bucket.finish for bucket in candidate.buckets)
    return Predicted(candidate, backward.step + added, added)


def choose(candidates: Sequence[Candidate], backward: Backward, max_gap: float, hides: bool = True) -> Choice:
    """Return the cheapest method whose gap is at most ``max_gap``; a lossless one wherever one hides.

    ``hides``: whether a prediction that one hides is believed; False where steps have shown that it doesn't.
    """
    allowed = [predict(candidate, backward) for candidate in candidates if candidate.gap <= max_gap]
    lossless = min((p for p in allowed if not p.candidate.gap), key=lambda p: p.seconds)
    if hides and lossless.added <= HIDDEN * lossless.seconds:
        return Choice(
            lossless.candidate.name, f"it is lossless and hides behind the backward pass ({_shown(lossless)})"
        )
    best = cheapest(
        {p.candidate.name: p.seconds for p in allowed}, {p.candidate.name: p.candidate.gap for p in allowed}
    )
    own = next(p for p in allowed if p.candidate.name == best)
    others = [p for p in allowed if p.candidate.gap or p is lossless]  # of the lossless ones, the best is tried
    others = sorted((p for p in others if p.seconds <= CLOSE * own.seconds), key=lambda p: (p is not own, p.seconds))
    tried = tuple(p.candidate.name for p in others[:MOST_TRIED])
    reason = f"no lossless method hides ({_shown(lossless)}), and it is predicted to be the fastest ({_shown(own)})"
    if own is lossless:
        reason = f"no method that max_loss_gap allows is predicted to be faster ({_shown(own)})"
    return Choice(best, reason, tried if len(tried) > 1 else ())


def cheapest(seconds: Mapping[str, float], gaps: Mapping[str, float]) -> str:
    """Return the method with the least seconds; among those that are as fast, the one with the least gap."""
    least = min(seconds.values())
    equal = [name for name in seconds if seconds[name] <= (1.0 + EQUAL) * least]
    return min(equal, key=lambda name: (gaps[name], seconds[name]))


def _shown(predicted: Predicted) -> str:
    return f"{predicted.candidate.name}: {1e3 * predicted.seconds:.1f} ms a step, {1e3 * predicted.added:.1f} exposed"


def wire_changed(before: Mapping[str, Line], now: Mapping[str, Line], factor: float) -> bool:
    """Return whether a collective of a megabyte takes ``factor`` times as long as before, or as much shorter."""
    size = 2.0**20
    ratios = [now[kind].seconds(size) / max(before[kind].seconds(size), 1e-9) for kind in before if kind in now]
    return any(ratio > factor or ratio < 1.0 / factor for ratio in ratios)
