"""Inference: evaluation, scores of the next token, predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hvdlm.protocols.types import Batch
from hvdlm_torch.forward import Forward


class Inference:
    """The methods of ``Trainable`` that leave the parameters as they are."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._model = forward.model
        self._pipeline = forward.pipeline
        self._spec = forward.spec
        self._model_shard = forward.model_shard
        self._device = forward.device
        self._eval_carry: Any = None

    def _show_averaged(self) -> None:
        """Have the model compute with the parameters that are evaluated, where a replica's own are others."""

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses in nats, valid tokens) of this rank's rows."""
        self._show_averaged()
        if batch.reset or self._eval_carry is None:
            self._eval_carry = self._model.initial_carry(len(batch.inputs), self._device)

        def compute(x: torch.Tensor | None) -> torch.Tensor:
            x = self._forward.features(batch) if x is None else x
            output, self._eval_carry = self._forward.losses(x, *self._forward.tensors(batch), self._eval_carry, False)
            return output

        output = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        loss_sum = float(output.sum(dtype=torch.float64)) if self._model_shard.stage.last else 0.0
        return loss_sum, batch.tokens

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token, float32 ``[rows, vocab]``, and the cache grown by ``tokens``."""
        self._show_averaged()
        inputs = torch.from_numpy(np.ascontiguousarray(tokens, np.int32)).to(self._device)
        cache = self._model.cache(len(tokens), self._device) if cache is None else cache
        self._model.check_length(cache, tokens.shape[1])
        settings, stage = self._spec.settings, self._model_shard.stage

        def compute(x: torch.Tensor | None) -> torch.Tensor:
            nonlocal cache
            hidden, cache = self._model.extend(inputs, x, cache)
            if not stage.last:
                return hidden
            return self._forward.collectives.all_scores(self._model.scores(hidden[:, -1])).float()

        scores = self._forward.fp32_pipeline.relay((*tokens.shape, settings.width), compute)
        if stage.count > 1:  # every rank continues with the same token, so that all need the last stage's scores
            if stage.last:
                scores = scores.contiguous()
            else:
                scores = torch.empty(len(tokens), settings.vocab, device=self._device)
            root = (stage.count - 1) * self._model_shard.tensor
            scores = self._forward.axes.model.broadcast(scores, root, "pipeline.scores")
        return scores.cpu().numpy(), cache

    @torch.no_grad()
    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores of all positions of the batch, float32 ``[rows, time, vocab]``."""
        self._show_averaged()
        inputs, _, _ = self._forward.tensors(batch)
        carry = self._model.initial_carry(len(inputs), self._device)
        hidden, _ = self._model.hidden(inputs, self._forward.features(batch), carry, False, False)
        return self._model.scores(hidden).float().cpu().numpy()

    @torch.no_grad()
    def read(self, batch: Batch) -> Any:
        """Return the cache of a model that has read the batch's features, for ``logits`` to continue from."""
        self._show_averaged()
        return self._model.read(self._forward.features(batch))

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``."""
        return self._model.select(cache, torch.from_numpy(rows).to(self._device))
