"""Random-k with a shared seed: all ranks send the same places, so payloads add up (Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import Compressor


class RandomK(Compressor):
    """Sends one element of each of k equal strata, values only: the places follow from seed and step.

    The first place is random, and the others follow in turn: every element is sent with probability k/n, so that
    E ||x - C(x)||^2 = (1 - k/n) ||x||^2, and none waits longer than n/k steps. Drawn anew at every step, one in a
    thousand waits seven times as long, and what piles up meanwhile disturbs adaptive optimizers.
    """

    collective = "all_reduce"

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[k]``]."""
        return [ops.take(tensor, self._places(tensor.shape[0], step))]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero but at the step's places."""
        return ops.segment_sum(payload[0], self._places(shape[0], step), num_segments=shape[0])

    def _places(self, count: int, step: Tensor) -> Tensor:
        strata = max(1, round(count * (self.settings.ratio or 0.1)))
        edges = np.arange(strata + 1) * count // strata
        widths = np.diff(edges)
        first = np.random.Generator(np.random.Philox(key=self.seed)).integers(0, widths)
        starts, lengths, firsts = (ops.convert_to_tensor(a.astype(np.int32)) for a in (edges[:-1], widths, first))
        return starts + ops.mod(firsts + step, lengths)
