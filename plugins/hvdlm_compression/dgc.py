"""Deep gradient compression (Lin et al. 2018): top-k with momentum correction, local clipping and a warm-up."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.top_k import TopK, largest


class DGC(TopK):
    """What is not sent accumulates with its momentum: u = m u + g, v = v + u (eq. 5 and 6); v is sparsified.

    Where an element is sent, u and v are set to zero (momentum factor masking, eq. 7).
    """

    feeds_back = True

    def begin(self, step: int) -> Hashable:
        """Choose the step's share: 25%, 6.25%, ... in four stages of warm-up (section 3.4)."""
        final, warmup = self.settings.ratio or 0.01, self.settings.warmup
        self.ratio = max(final, 0.25 ** (1 + 4 * step // warmup)) if step < warmup else final
        return self.ratio

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes after warm-up."""
        return 8 * max(1, round(shape[0] * (self.settings.ratio or 0.01)))

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the velocity u and the accumulated velocity v, of ``shape``."""
        return {"velocity": np.zeros(shape, np.float32), "accumulated": np.zeros(shape, np.float32)}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum in one round; see ``interfaces.Compressor``."""
        if self.settings.clip:
            limit = self.settings.clip * self.ranks**-0.5  # section 3.2
            norm = ops.sqrt(ops.sum(tensor * tensor))
            tensor = tensor * ops.minimum(1.0, limit / (norm + 1e-12))
        velocity = ops.convert_to_tensor(memory["velocity"]) * self.settings.momentum + tensor
        accumulated = ops.convert_to_tensor(memory["accumulated"]) + velocity
        shape = tuple(tensor.shape)
        places = largest(accumulated, self.ratio)
        payload = [ops.take(accumulated, places), places]
        kept = 1.0 - self.decompress([ops.ones_like(payload[0]), places], shape, step)
        memory["velocity"].assign(velocity * kept)
        memory["accumulated"].assign(accumulated * kept)
        answer = yield Request("all_gather", payload)
        return self.add_up(answer, shape, step), lambda: self.decompress(payload, shape, step)
