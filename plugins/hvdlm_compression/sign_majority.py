"""Signs with majority vote: one bit an element (Bernstein et al. 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.scaled_sign import ScaledSign, signs


class SignMajority(ScaledSign):
    """The sign that most ranks vote for (0 in a tie), times the ranks' mean scale, so that dense tensors fit in."""

    def add_up(self, payloads: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return the vote times the sum of the scales."""
        scales, packed = payloads  # [ranks, blocks], [ranks, blocks, block / 8]
        vote = ops.sign(ops.sum(signs(packed), axis=0)) * ops.expand_dims(ops.sum(scales, axis=0), -1)
        return ops.reshape(vote, (-1,))[: shape[0]]
