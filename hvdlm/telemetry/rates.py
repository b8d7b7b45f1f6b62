"""Figures over the steps since they were last told: single steps would mislead where only some communicate."""

from __future__ import annotations

from hvdlm.protocols.types import StepResult


class Interval:
    """Sums over steps. ``parameters``: how many float32 gradients a rank would hand over at every step."""

    def __init__(self, parameters: int) -> None:
        self._dense = 4 * parameters
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.steps = self._bytes = 0
        self._tokens = self._seconds = self._waited = 0.0
        self._busy: float | None = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        """Add a step that took ``seconds``."""
        self.steps += 1
        self._tokens += result.tokens
        self._seconds += seconds
        self._waited += result.comm_seconds
        self._bytes += result.comm_bytes
        known = self._busy is not None and result.transfer_seconds is not None
        self._busy = self._busy + result.transfer_seconds if known else None  # type: ignore[operator]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self._seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self._tokens / self._seconds

    @property
    def comm_seconds(self) -> float:
        """Seconds of a step in which this rank stood still for communication."""
        return self._waited / self.steps

    @property
    def comm_share(self) -> float:
        """Share of the time in which this rank stood still for communication."""
        return self._waited / self._seconds

    @property
    def comm_bytes(self) -> float:
        """Bytes of a step that this rank handed to collectives."""
        return self._bytes / self.steps

    @property
    def compression(self) -> float | None:
        """Bytes of dense float32 gradients at every step, divided by the bytes handed over; None where none were."""
        return self._dense * self.steps / self._bytes if self._bytes else None

    @property
    def overlap(self) -> float | None:
        """Share of the time in collectives that hid behind computation; None where the backend can't tell."""
        return max(0.0, 1.0 - self._waited / self._busy) if self._busy else None

    def figures(self, result: StepResult, learning_rate: float) -> dict[str, float | None]:
        """Return what is logged of the step just added: rates, seconds and bytes are means over the interval."""
        return {
            "loss": result.loss,
            "learning_rate": learning_rate,
            "tokens": result.tokens,
            "tokens_per_second": self.tokens_per_second,
            "grad_norm": result.grad_norm,
            "seconds": self.seconds,
            "comm_seconds": self.comm_seconds,
            "comm_share": self.comm_share,
            "comm_bytes": self.comm_bytes,
            "compression": self.compression,
            "overlap": self.overlap,
            **result.extra,
            **({"skipped": True} if result.skipped else {}),
        }


def logged(step: int, every: int, result: StepResult) -> bool:
    """Return whether a step is logged: the first, those due, and any whose update was left out."""
    return step == 1 or step % every == 0 or result.skipped
