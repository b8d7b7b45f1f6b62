"""A model on this rank as it answers: evaluates, scores the next token, predicts, reads. ``trainable.py`` trains it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.axis_groups import Axes
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.types import Batch
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.losses import ctc
from hvdlm_torch.models import make_model
from hvdlm_torch.pipeline import Pipeline

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Answering:
    """This rank's share of the model; whoever holds its parameters binds them."""

    def __init__(
        self, spec: ModelSpec, model_shard: ModelShard, axes: Axes, config: Config, device: torch.device, rank: int
    ) -> None:
        self._spec, self._model_shard, self._axes = spec, model_shard, axes
        self._config, self._device = config, device
        self._collectives = Collectives(axes.tensor, model_shard)
        self._model = make_model(spec, model_shard, self._collectives)
        self._pipeline = Pipeline(model_shard, axes, config.parallel.schedule, rank, device)
        self._eval_carry: Any = None

    def _losses(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        x: Any,
        carry: Any,
        training: bool,
    ) -> tuple[torch.Tensor, Any]:
        """Return the losses ``[rows * time]`` in nats, 0 where the target doesn't count, and the carried state.

        In a stage but the last: what it passes on, instead of losses. ``x``: what the stage before passed on, in the
        first stage the batch's features. A loss of whole rows (CTC): ``[rows]``.
        """
        half = _HALF.get(self._config.train.precision)
        with torch.autocast(self._device.type, dtype=half, enabled=half is not None):
            hidden, carry = self._model.hidden(inputs, x, carry, training, self._config.train.activation_checkpointing)
            if not self._model_shard.stage.last:
                return hidden, carry
            scores = self._model.scores(hidden)  # [rows, time, vocab / tensor ranks]
        if self._spec.loss == "ctc":
            return ctc(scores.float(), self._model.lengths(x), targets, weights), carry
        smoothing = self._config.train.label_smoothing if training else 0.0
        losses = self._collectives.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), smoothing)
        return (losses if weights is None else losses * weights.flatten()), carry

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        weights = None if batch.weights is None else torch.from_numpy(batch.weights).to(self._device)
        targets = torch.from_numpy(batch.targets).to(self._device, torch.int64)
        return torch.from_numpy(batch.inputs).to(self._device), targets, weights

    def _features(self, batch: Batch) -> dict[str, torch.Tensor] | None:
        features = {name: torch.from_numpy(array).to(self._device) for name, array in batch.features.items()}
        return features or None

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (loss sum, tokens); see ``interfaces.Trainable``."""
        carry = None if batch.reset else self._eval_carry

        def compute(x: torch.Tensor | None) -> torch.Tensor:
            x = self._features(batch) if x is None else x
            made, self._eval_carry = self._losses(*self._tensors(batch), x, carry, False)
            return made if self._model_shard.stage.last else made.float()

        made = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        return (float(made.sum(dtype=torch.float64)) if self._model_shard.stage.last else 0.0), batch.tokens

    @torch.no_grad()
    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token and the cache; see ``interfaces.Trainable``."""
        inputs = torch.from_numpy(np.ascontiguousarray(tokens, np.int32)).to(self._device)
        cache = self._model.cache(len(tokens), self._device) if cache is None else cache
        settings, stage = self._spec.settings, self._model_shard.stage

        def compute(x: torch.Tensor | None) -> torch.Tensor:
            nonlocal cache
            hidden, cache = self._model.extend(inputs, x, cache)
            return self._collectives.all_scores(self._model.scores(hidden[:, -1])).float() if stage.last else hidden

        made = self._pipeline.relay((*tokens.shape, settings.width), compute)
        if stage.count > 1:
            scores = made.contiguous() if stage.last else torch.empty(len(tokens), settings.vocab, device=self._device)
            root = (stage.count - 1) * self._model_shard.tensor
            made = self._axes.model.broadcast(scores, root, "pipeline.scores")
        return made.cpu().numpy(), cache

    @torch.no_grad()
    def predict(self, batch: Batch) -> np.ndarray:
        """Return all scores of the batch; see ``interfaces.Trainable``."""
        inputs, _, _ = self._tensors(batch)
        hidden, _ = self._model.hidden(inputs, self._features(batch), None, False, False)
        return self._model.scores(hidden).float().cpu().numpy()

    @torch.no_grad()
    def read(self, batch: Batch) -> Any:
        """Return the cache of what the model has read; see ``interfaces.Trainable``."""
        return self._model.read(self._features(batch))

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache of these rows; see ``interfaces.Trainable``."""
        return self._model.select(cache, torch.from_numpy(rows).to(self._device))
