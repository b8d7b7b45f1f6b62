"""What a model needs that carries nothing from batch to batch: a plugin's then implements ``hidden`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_torch.collectives import Collectives


class Plain:
    """A language model over parameters by name, ``self.p``; its settings are ``self.s``."""

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self.p: dict[str, torch.Tensor] = {}

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these tensors as parameters."""
        self.p = dict(parameters)

    def hidden(
        self, tokens: torch.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens`` ``[rows, time]``, and ``carry`` as it is.

        Position t may depend on tokens 0 to t alone.
        """
        raise NotImplementedError

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what ``hidden`` has computed: the logits."""
        return hidden

    def cache(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return no tokens yet: they are all read again for each that follows."""
        return torch.zeros(rows, 0, dtype=torch.int32, device=device)

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the logits of tokens that follow those in ``cache``, and all of them."""
        read = torch.cat([cache, tokens], 1)
        return self.hidden(read, None, None, False, False)[0], read

    def carry_arrays(self, carry: Any) -> dict[str, np.ndarray]:
        """Return nothing: nothing is carried from batch to batch."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro: int | None, device: torch.device) -> dict:
        """Return nothing."""
        return {}
