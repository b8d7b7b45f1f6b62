"""The base class of models that carry no state from batch to batch: a plugin's model implements ``hidden`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.dropout import DropoutMasks


class ModelBase:
    """A language model.

    Attributes:
        s: its settings.
        p: its parameters by name.
        head: the table ``[vocab, embed]`` and bias of which ``scores`` is the product, if it is one and nothing else:
            losses of large vocabularies are then computed in chunks.
        masks: draws this rank's dropout masks: ``self.masks.drop(x, rate)`` in training.
        own_masks: whether the model draws nothing but these. Ranks that are threads of one process then compute their
            forward passes at the same time; those of other models take turns.
    """

    head: tuple[torch.Tensor, torch.Tensor | None] | None = None
    masks: DropoutMasks
    own_masks = False

    def __init__(self, settings: Any, model_shard: ModelShard, collectives: Collectives) -> None:
        self.s = settings
        self.p: dict[str, torch.Tensor] = {}

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as parameters."""
        self.p = dict(parameters)

    def hidden(
        self, tokens: torch.Tensor, x: Any, carry: Any, training: bool, checkpointing: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits ``[rows, time, vocab]`` of ``tokens`` ``[rows, time]``, and ``carry`` unchanged.

        Those of position t may depend on tokens 0 to t only.
        """
        raise NotImplementedError

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, which ``hidden`` has computed."""
        return hidden

    def initial_carry(self, rows: int, device: torch.device) -> None:
        """Return the state at the start of a text: there is none."""

    def cache(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return the empty cache of decoding: the tokens so far, which are all read again for each that follows."""
        return torch.zeros(rows, 0, dtype=torch.int32, device=device)

    def check_length(self, cache: torch.Tensor, added: int) -> None:
        """Accept any number of tokens."""

    def extend(self, tokens: torch.Tensor, x: torch.Tensor | None, cache: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the logits of tokens that follow those in ``cache``, and the grown cache."""
        text = torch.cat([cache, tokens], 1)
        return self.hidden(text, None, None, False, False)[0], text

    def carry_arrays(self, carry: Any) -> dict[str, np.ndarray]:
        """Return the carried state as arrays, for checkpoints: there is none."""
        return {}

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro_rows: int | None, device: torch.device) -> dict:
        """Return the carried state of every micro-batch, from a checkpoint: there is none."""
        return {}
