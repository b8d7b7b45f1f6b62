"""Random-k with a shared seed: all ranks send the same indices, which can be summed (Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from hvdlm.protocols.types import Tensor
from hvdlm_compression.compressor import Compressor
from hvdlm_compression.tensor_ops import sparse


class RandomK(Compressor):
    """Sends the values of one element of each of k equal strata; the indices are functions of seed and step.

    A stratum's first index is random, and the others follow in turn: every element is sent with probability k/n, so
    that E ||x - C(x)||^2 = (1 - k/n) ||x||^2, and none waits longer than n/k steps. If the indices were drawn anew at
    every step, one element in a thousand would wait seven times as long, and the error accumulated meanwhile would
    disturb adaptive optimizers.
    """

    collective = "all_reduce"
    default_ratio = 0.1

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[k]``]."""
        return [ops.take(tensor, self._indices(tensor.shape[0], step))]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero except at the step's indices."""
        return sparse(payload[0], self._indices(shape[0], step), shape[0])

    def _indices(self, count: int, step: Tensor) -> Tensor:
        strata = max(1, round(count * self.ratio))
        edges = np.arange(strata + 1) * count // strata
        widths = np.diff(edges)
        first = np.random.Generator(np.random.Philox(key=self.seed)).integers(0, widths)
        starts, lengths, firsts = (ops.convert_to_tensor(a.astype(np.int32)) for a in (edges[:-1], widths, first))
        return starts + ops.mod(firsts + step, lengths)
