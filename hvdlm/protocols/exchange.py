"""The exchange of gradients along the data axis."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hvdlm.protocols.group import Handle
from hvdlm.protocols.types import Tensor, Traffic

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.parallel.flat_layout import FlatLayout


@dataclass(frozen=True)
class ExchangeTraits:
    """What an exchange is, the same from its first step to its last.

    Attributes:
        size: ranks along the data axis.
        replicas_diverge: whether ranks' parameters and optimizer states differ between steps (local SGD, DiLoCo).
        zero_rank, zero_size: this rank updates shard ``zero_rank`` of ``zero_size`` equal shards of every bucket
            (ZeRO); 0 and 1: all of it.
        scatters_every: whether every micro-batch's gradients are scattered, so that none are kept whole (ZeRO-2).
        shards_parameters: whether ranks hold their shards of the parameters only, in a ``make_unit_layout``, and gather
            them layer by layer (ZeRO-3).
        rounds_parameters: whether ``gather`` rounds: the float32 parameters are the shards that ranks update and save.
        replicated: prefixes of the names in ``state()`` whose entries are equal on all ranks of the data axis.
    """

    size: int
    replicas_diverge: bool = False
    zero_rank: int = 0
    zero_size: int = 1
    scatters_every: bool = False
    shards_parameters: bool = False
    rounds_parameters: bool = False
    replicated: tuple[str, ...] = ()


class ExchangeState(Protocol):
    """What an exchange keeps from step to step."""

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Start from flat float32 ``parameters`` ``[size]``; called again when they are replaced. All ranks call.

        Where ranks shard the parameters (``traits.shards_parameters``), they are this rank's, ``[size / zero_size]``.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of what is kept from step to step (error feedback), for the checkpoint."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state()`` returned; missing entries start from their initial values."""


class Exchange(ExchangeState, Protocol):
    """Reduces gradients over the data axis, between the backward pass and the optimizer step.

    The framework passes its gradients in flat buckets, in the order in which the backward pass finishes them, and gets
    handles back, so that communication overlaps with the rest of the backward pass. One step is: ``begin``, ``start``
    for every bucket and ``start_metrics``, waiting for all handles, the update, ``finish``.

    Attributes:
        traits: what it is.
        agreed: whether all ranks have the same parameters now, after the last step.
        stands_for: factor on this step's token count: 1 if metrics were summed over all ranks, otherwise the number of
            ranks that they stand for.
        traffic: the group's counters.
    """

    traits: ExchangeTraits

    @property
    def agreed(self) -> bool: ...

    @property
    def stands_for(self) -> int: ...

    @property
    def traffic(self) -> dict[str, Traffic]: ...

    def begin(self, step: int) -> Hashable:
        """Prepare for ``step``; return its phase: steps of one phase call the same collectives (and share a graph)."""

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Start to sum flat ``bucket`` ``[elements]`` over the data axis; ``index`` numbers the buckets of a step.

        ``bucket`` belongs to the exchange until the sum is there, which may overwrite it where ``Framework.in_place``.
        The handle's result is this rank's shard of the sum, ``[elements / zero_size]``.
        """

    def start_metrics(self, values: Tensor) -> Handle:
        """Start to sum float64 ``[n]`` (loss sum, valid tokens) over the data axis."""

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return every bucket's updated parameters, ``[elements]``, from this rank's shards of them."""

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Return what replaces the updated flat ``parameters`` ``[size]``; None: they stay."""


class ShardedExchange(Exchange, Protocol):
    """An exchange whose ranks update a shard of every bucket each (ZeRO)."""

    def gather_vector(self, shard: Tensor, index: int, purpose: str) -> Handle:
        """Start to gather float32 values of a bucket, as they are, from this rank's of its shard.

        ``purpose``: the first word of the collective's name. The handle's result is ``[elements]``.
        """


@runtime_checkable
class RestoresState(Protocol):
    """An exchange whose state, such as error feedback, a step that is not applied leaves as it was. Optional.

    Without it, or with a Trainable that doesn't call it, one gradient that is not finite stays in the state, and all
    later steps are skipped until the run rolls back.
    """

    def keep_copies(self) -> None:
        """From now on, copy the state where a step begins. Called once, before the first step."""

    def settle(self, applied: Tensor) -> None:
        """Restore the copies unless ``applied``, a scalar bool. Called in every step, perhaps in its graph, after sums.

        All ranks call with the same value.
        """
