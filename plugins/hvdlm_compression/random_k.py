"""Random-k with a shared seed: all ranks send the same places, so payloads add up (Stich et al. 2018, def. 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from hvdlm.interfaces import Tensor
from hvdlm_compression.base import Compressor
from hvdlm_compression.noise import uniform
from hvdlm_compression.top_k import share


class RandomK(Compressor):
    """Sends one random element of each of k equal strata, values only: the places follow from seed and step.

    Every element is sent with probability k/n, so that E ||x - C(x)||^2 = (1 - k/n) ||x||^2.
    """

    collective = "all_reduce"

    def compress(self, tensor: Tensor, step: Tensor) -> Sequence[Tensor]:
        """Return [values float32 ``[k]``]."""
        return [ops.take(tensor, self._places(tensor.shape[0], step))]

    def decompress(self, payload: Sequence[Tensor], shape: tuple[int, ...], step: Tensor) -> Tensor:
        """Return float32 ``[n]``, zero but at the step's places."""
        return ops.segment_sum(payload[0], self._places(shape[0], step), num_segments=shape[0])

    def _places(self, count: int, step: Tensor) -> Tensor:
        strata = share(count, self.settings.ratio or 0.1)
        edges = np.arange(strata + 1) * count // strata
        widths = ops.convert_to_tensor(np.diff(edges).astype(np.float32))
        inside = ops.cast(ops.floor(uniform(strata, step, self.seed) * widths), "int32")
        # The product may round up to the width itself.
        inside = ops.minimum(inside, ops.convert_to_tensor((np.diff(edges) - 1).astype(np.int32)))
        return ops.convert_to_tensor(edges[:-1].astype(np.int32)) + inside
