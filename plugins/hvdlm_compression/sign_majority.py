"""Signs with majority vote: one bit an element (Bernstein et al. 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.scaled_sign import ScaledSign, signs


class SignMajority(ScaledSign):
    """The majority of the ranks' signs (0 in a tie) times the sum of their scales: as large as a sum of gradients."""

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the majority sign times the sum of the scales."""
        scales, packed = payloads  # [ranks, blocks], [ranks, blocks, block / 8]
        vote = ops.sign(ops.sum(signs(packed), axis=0)) * ops.expand_dims(ops.sum(scales, axis=0), -1)
        return ops.reshape(vote, (-1,))[: shape[0]]
