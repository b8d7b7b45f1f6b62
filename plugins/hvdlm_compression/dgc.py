"""Deep gradient compression (Lin et al. 2018): top-k with momentum correction, local clipping and a warm-up."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping
from typing import Any

import numpy as np
from keras import ops

from hvdlm.protocols.compressor import Reduced, Request
from hvdlm.protocols.types import Tensor
from hvdlm_compression.top_k import TopK, largest, sent_count


class DGC(TopK):
    """Sparsifies v, in which elements that are not sent accumulate with momentum: u = m u + g, v = v + u (eq. 5 and 6).

    Where an element is sent, u and v are set to zero (momentum factor masking, eq. 7).
    """

    feeds_back = True

    def begin(self, step: int) -> Hashable:
        """Choose the step's ratio: 25%, 6.25%, ... in four stages of warm-up (section 3.4)."""
        warmup = self.settings.warmup
        self._step_ratio = self.ratio
        if step < warmup:
            self._step_ratio = max(self.ratio, 0.25 ** (1 + 4 * step // warmup))
        return self._step_ratio

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the payload after warm-up."""
        return 8 * sent_count(shape[0], self.ratio)

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the velocity u and the accumulated velocity v, of ``shape``."""
        return {"velocity": np.zeros(shape, np.float32), "accumulated": np.zeros(shape, np.float32)}

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Sum sparsified tensors in one round."""
        if self.settings.clip:
            limit = self.settings.clip * self.ranks**-0.5  # section 3.2
            norm = ops.sqrt(ops.sum(tensor * tensor))
            tensor = tensor * ops.minimum(1.0, limit / (norm + 1e-12))
        velocity = ops.convert_to_tensor(memory["velocity"]) * self.settings.momentum + tensor
        accumulated = ops.convert_to_tensor(memory["accumulated"]) + velocity
        shape = tuple(tensor.shape)
        indices = largest(accumulated, self._step_ratio)
        payload = [ops.take(accumulated, indices), indices]
        kept = 1.0 - self.decompress([ops.ones_like(payload[0]), indices], shape, step)
        memory["velocity"].assign(velocity * kept)
        memory["accumulated"].assign(accumulated * kept)
        gathered = yield Request("all_gather", payload)
        return self.add_up(gathered, shape, step), lambda: self.decompress(payload, shape, step)
