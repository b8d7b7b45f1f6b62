"""Inference: evaluation, scores of the next token, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hvdlm.protocols.inference import SamplingRule
from hvdlm.protocols.model import JoinsCaches
from hvdlm.protocols.types import Batch
from hvdlm_language.context_ranks import cut_all
from hvdlm_torch.devices import to_device
from hvdlm_torch.forward import Forward
from hvdlm_torch.gathered_layers import GatheredLayers
from hvdlm_torch.sampling import choose


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
        self.joins_caches = isinstance(self._model, JoinsCaches)
        # Horovod's thread resizes what it gathers into, which PyTorch refuses for tensors of its inference mode.
        several = self._model_shard.tensor * self._model_shard.stage.count > 1
        self._without_gradients = torch.no_grad if several else torch.inference_mode
        self._layers: GatheredLayers | None = None
        # The chunks' models in the half precision of the run, while the parameters stay as they are.
        self._rounded: Any = None

    def _gather_in(self, layers: GatheredLayers) -> None:
        """Have the model, which is bound to the parameters of ``layers``, gather them."""
        model: Any = self._model
        model.layers = self._layers = layers
        if layers.tied is not None:
            model.head = layers.tied, None
        self._without_gradients = torch.no_grad

    def _show_averaged(self) -> None:
        """Have the model compute with the parameters that are evaluated, where a replica's own are others."""

    def _parameters(self) -> Mapping[str, torch.Tensor]:
        """Return the weights that the model computes with."""
        raise NotImplementedError

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses in nats, valid tokens) of this rank's rows, with context ranks of its positions."""
        loss_sum, tokens, _ = self.eval_figures(batch)
        return loss_sum, tokens

    @torch.no_grad()
    def eval_figures(self, batch: Batch) -> tuple[float, float, float]:
        """Return ``eval_step``'s figures and the valid tokens of which no other has a higher score."""
        self._show_averaged()
        (batch,) = cut_all([batch], self._forward.context)
        if batch.reset or self._eval_carry is None:
            self._eval_carry = self._model.initial_carry(len(batch.inputs), self._device)

        def compute(chunk: int, x: torch.Tensor | None) -> torch.Tensor:
            x, evaluated = self._forward.features(batch) if x is None else x, self._forward.chunks[chunk].evaluated
            output, self._eval_carry = evaluated(x, *self._forward.tensors(batch), self._eval_carry)
            return output

        output = self._pipeline.relay(self._pipeline.shape(batch, self._spec.settings.width), compute)
        loss_sum, correct = output.tolist() if self._model_shard.stage.last else (0.0, 0.0)
        return loss_sum, batch.tokens, correct

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Return the scores of the next token, float32 ``[rows, vocab]``, and the cache grown by ``tokens``."""
        self._show_averaged()
        with self._without_gradients():
            scores, cache = self._extend(tokens, cache)
            scores = self._from_last_stage(scores, (len(tokens), self._spec.settings.vocab), "scores")
            return scores.cpu().numpy(), cache

    def sample(self, tokens: np.ndarray, cache: Any, uniform: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, Any]:
        """Return the tokens chosen from those scores, int32 ``[rows, draws]``, and the cache grown by ``tokens``."""
        self._show_averaged()
        with self._without_gradients():
            scores, cache = self._extend(tokens, cache)
            chosen = None if scores is None else choose(scores, to_device(uniform, self._device), rule)
            return self._from_last_stage(chosen, uniform.shape, "tokens", torch.int32).cpu().numpy(), cache

    def join(self, caches: Sequence[Any], rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn."""
        model: Any = self._model
        with self._without_gradients():
            return [model.join(of_chunk, to_device(rows, self._device)) for of_chunk in zip(*caches, strict=True)]

    def _extend(self, tokens: np.ndarray, cache: Any) -> tuple[torch.Tensor | None, Any]:
        """Return the scores of the next token on the device (None: a later stage has them), and the grown cache."""
        models, chunks = self._decoders(), self._model_shard.chunks
        inputs = to_device(np.ascontiguousarray(tokens, np.int32), self._device)
        caches = [model.cache(len(tokens), self._device) for model in models] if cache is None else list(cache)
        models[0].check_length(caches[0], tokens.shape[1])

        def compute(chunk: int, x: torch.Tensor | None) -> torch.Tensor:
            with self._forward.autocast():
                hidden, caches[chunk] = models[chunk].extend(inputs, x, caches[chunk])
                if not chunks[chunk].stage.last:
                    return hidden
                return self._forward.collectives.all_scores(models[chunk].scores(hidden[:, -1])).float()

        output = self._forward.fp32_pipeline.relay((*tokens.shape, self._spec.settings.width), compute)
        return output if self._model_shard.stage.last else None, caches

    def _decoders(self) -> list[Any]:
        """Return the chunks' models that generate. In half precision, weights are rounded once, not for every token."""
        if self._layers or not (self._forward.half and self.joins_caches):
            return [chunk.model for chunk in self._forward.chunks]
        if self._rounded is None:
            parameters = self._parameters()
            self._rounded = [chunk.rounded(parameters) for chunk in self._forward.chunks]
        return self._rounded

    def _from_last_stage(
        self, output: torch.Tensor | None, shape: Sequence[int], name: str, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return the last stage's ``output`` of ``shape``: every rank continues with the same token."""
        stage = self._model_shard.stage
        if stage.count > 1:
            output = torch.empty(tuple(shape), dtype=dtype, device=self._device) if output is None else output
            root = (stage.count - 1) * self._model_shard.tensor
            output = self._forward.axes.model.broadcast(output.contiguous(), root, f"pipeline.{name}")
        assert output is not None
        return output

    @torch.no_grad()
    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores of all positions of the batch, float32 ``[rows, time, vocab]``."""
        self._show_averaged()
        inputs, *_ = self._forward.tensors(batch)
        carry = self._model.initial_carry(len(inputs), self._device)
        hidden, _ = self._model.hidden(inputs, self._forward.features(batch), carry, False, False)
        return self._model.scores(hidden).float().cpu().numpy()

    @torch.no_grad()
    def read(self, batch: Batch) -> Any:
        """Return the cache of a model that has read the batch's features, for ``logits`` to continue from."""
        self._show_averaged()
        return [self._model.read(self._forward.features(batch))]

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``."""
        return [self._model.select(one, torch.from_numpy(rows).to(self._device)) for one in cache]
