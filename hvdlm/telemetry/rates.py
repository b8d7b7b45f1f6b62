"""Rates and means over the steps of a run, computed once for all plugins that report them.

The loop keeps one sum over all steps. A plugin reports the difference from the sum at its last report, since
single steps would mislead where only some of them communicate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hvdlm.protocols.types import StepResult


@dataclass(frozen=True)
class Rates:
    """Sums over consecutive steps, and the rates and means that follow from them.

    Attributes:
        gradient_bytes: float32 gradients of this rank, which a plain all-reduce communicates at every step.
        peak_tokens_per_second: what all ranks' devices would reach at their peak rate; None: unknown.
        steps: steps that are summed up.
        tokens: valid tokens of all ranks.
        total_seconds: wall time.
        total_comm_seconds: time that this rank was blocked by communication.
        total_comm_bytes: bytes that this rank passed to collectives.
        total_node_bytes: those of sums within a node, where sums have two levels.
        transfer_seconds: time of collectives, hidden behind computation or not.
        steps_without_transfer: steps whose backend doesn't measure transfer_seconds.
        total_data_seconds: time that this rank waited for batches.
    """

    gradient_bytes: int
    peak_tokens_per_second: float | None = None
    steps: int = 0
    tokens: float = 0.0
    total_seconds: float = 0.0
    total_comm_seconds: float = 0.0
    total_comm_bytes: int = 0
    total_node_bytes: int = 0
    transfer_seconds: float = 0.0
    steps_without_transfer: int = 0
    total_data_seconds: float = 0.0

    def after(self, result: StepResult, seconds: float) -> Rates:
        """Return the sums after one more step, which took ``seconds``."""
        return Rates(
            self.gradient_bytes,
            self.peak_tokens_per_second,
            self.steps + 1,
            self.tokens + result.tokens,
            self.total_seconds + seconds,
            self.total_comm_seconds + result.comm_seconds,
            self.total_comm_bytes + result.comm_bytes,
            self.total_node_bytes + result.axis_bytes.get("node", 0),
            self.transfer_seconds + (result.transfer_seconds or 0.0),
            self.steps_without_transfer + (result.transfer_seconds is None),
            self.total_data_seconds + result.data_seconds,
        )

    def since(self, earlier: Rates | None) -> Rates:
        """Return the sums over the steps after ``earlier``; None: over all."""
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in _SUMS if earlier})

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return self.total_seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens / self.total_seconds

    @property
    def comm_seconds(self) -> float:
        """Mean seconds of a step in which this rank was blocked by communication."""
        return self.total_comm_seconds / self.steps

    @property
    def comm_share(self) -> float:
        """Fraction of the time in which this rank was blocked by communication."""
        return self.total_comm_seconds / self.total_seconds

    @property
    def comm_bytes(self) -> float:
        """Mean bytes of a step that this rank passed to collectives."""
        return self.total_comm_bytes / self.steps

    @property
    def data_share(self) -> float:
        """Fraction of the time in which this rank waited for batches."""
        return self.total_data_seconds / self.total_seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization (Chowdhery et al. 2022, appendix B): the fraction of the devices' peak rate."""
        return self.tokens_per_second / self.peak_tokens_per_second if self.peak_tokens_per_second else None

    @property
    def compression(self) -> float | None:
        """Bytes of dense float32 gradients at every step, divided by the bytes communicated; None where none were.

        Of sums in two levels, the bytes between nodes count.
        """
        sent = self.total_comm_bytes - self.total_node_bytes
        return self.gradient_bytes * self.steps / sent if sent else None

    @property
    def overlap(self) -> float | None:
        """Fraction of the time in collectives that computation hid; None where the backend doesn't measure it."""
        if self.steps_without_transfer or not self.transfer_seconds:
            return None
        return max(0.0, 1.0 - self.total_comm_seconds / self.transfer_seconds)

    def figures(self, result: StepResult, learning_rate: float) -> dict[str, float | None]:
        """Return what is logged of the last step: its own figures, and rates and means over all steps summed up."""
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
            "data_seconds": self.total_data_seconds / self.steps,
            "data_share": self.data_share,
            "mfu": self.mfu,
            "device_memory_peak": result.device_memory_peak,
            **({"skipped": True} if result.skipped else {}),
        }


_SUMS = [field.name for field in fields(Rates)[2:]]


def is_logged(step: int, every: int, result: StepResult) -> bool:
    """Return whether a step is logged: the first, every ``every``-th, and any whose update was skipped."""
    return step == 1 or step % every == 0 or result.skipped
