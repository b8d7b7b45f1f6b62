"""The loss of a batch: the forward pass of this rank's shard of the model, and the loss of its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.sharding_rules import ModelShard
from hvdlm.protocols.model import Model
from hvdlm.protocols.types import Batch
from hvdlm_language.axis_groups import Axes
from hvdlm_language.loss_terms import LossTerms
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.devices import to_device
from hvdlm_torch.dropout import DropoutMasks
from hvdlm_torch.losses import chunked_cross_entropy, chunked_evaluation, ctc, rows_of_chunk
from hvdlm_torch.models import make_model
from hvdlm_torch.pipeline import Pipeline

_HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward:
    """The forward pass, shared by training (``trainable.py``) and inference (``inference.py``).

    Attributes:
        model: the layers of this rank's pipeline stage.
        chunks: the forward passes that this rank computes: this one, or one of every virtual stage. The Trainable binds
            the parameters of their models.
        collectives: those of its tensor group.
        context: the ranks that have other positions of the same rows; None: there are none.
        masks: of dropout.
        pipeline: passes activations and their gradients between stages.
        fp32_pipeline: passes activations in float32, so that texts don't depend on the number of stages.
        half: the half precision that products are computed in; None: float32.
    """

    def __init__(
        self, spec: ModelSpec, model_shard: ModelShard, axes: Axes, config: Config, device: torch.device, rank: int
    ) -> None:
        self.spec = spec
        self.model_shard = model_shard
        self.axes = axes
        self.config = config
        self.device = device
        self.half = _HALF_PRECISION.get(config.train.precision)
        self.collectives = Collectives(axes.tensor, model_shard)
        model: Any = make_model(spec, model_shard, self.collectives)
        self.context = model.context = axes.context
        self.model: Model = model
        masks_of_pytorch = (
            device.type != "cpu" or config.train.compile is True or not getattr(model, "own_masks", False)
        )
        self.masks = model.masks = DropoutMasks(device, masks_of_pytorch)
        virtual = [Forward(spec, shard, axes, config, device, rank) for shard in model_shard.virtual]
        for chunk in virtual:
            of_chunk: Any = chunk.model
            chunk.masks = of_chunk.masks = self.masks
        self.chunks = tuple(virtual) or (self,)
        dtype, schedule = _HALF_PRECISION.get(config.train.precision, torch.float32), config.parallel.schedule
        self.pipeline = Pipeline(model_shard, axes, schedule, rank, device, dtype)
        self.fp32_pipeline = Pipeline(model_shard, axes, schedule, rank, device, torch.float32)

    def autocast(self) -> torch.autocast:
        """Return the context in which products are computed in the precision of the run."""
        # Autocast keeps rounded weights until the context ends, also of layers that were freed (ZeRO-3) or offloaded.
        cached = self.config.parallel.zero < 3 and not self.config.train.activation_offload
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None, cache_enabled=cached)

    def rounded(self, parameters: Mapping[str, torch.Tensor]) -> Any:
        """Return a model with the weights of products in half precision, to which autocast would round them anew."""
        model: Any = make_model(self.spec, self.model_shard, self.collectives)
        kept = "embed.", "norm"  # tables that are added, and norms, are float32
        model.bind({n: t if any(word in n for word in kept) else t.to(self.half) for n, t in parameters.items()})
        model.head = tuple(None if tensor is None else tensor.to(self.half) for tensor in model.head)
        return model

    def losses(
        self,
        x: Any,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        starts: torch.Tensor | None,
        carry: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Return the losses of training in nats and the carried state.

        The losses are ``[rows * time]``, 0 where the target doesn't count; of CTC, which judges whole rows, ``[rows]``.
        Every pipeline stage but the last returns its activations in their place. ``x``: the activations of the stage
        before; in the first stage, the batch's features. ``starts``: ``Batch.document_starts``.
        """
        terms = LossTerms.of(self.config.train)
        flat = targets.flatten(), None if weights is None else weights.flatten()
        head = self._chunked_head(targets)
        with self.autocast():
            hidden, carry = self._hidden(inputs, x, starts, carry, True)
            if not self.model_shard.stage.last:
                return hidden, carry
            scores = hidden if head else self.model.scores(hidden)  # [rows, time, vocab / tensor ranks]
        # Outside of autocast and in float32: exponentials of large scores overflow in half precision.
        if head:
            dtype = self.half or hidden.dtype
            return chunked_cross_entropy(hidden.flatten(0, 1), head[0], head[1], *flat, terms, dtype), carry
        if self.spec.loss == "ctc":
            return ctc(scores.float(), self.model.lengths(x), targets, weights), carry
        losses = self.collectives.cross_entropy(scores.flatten(0, 1).float(), flat[0], terms)
        return (losses if flat[1] is None else losses * flat[1]), carry

    def evaluated(
        self,
        x: Any,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        starts: torch.Tensor | None,
        carry: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Return the figures of an evaluation, float64 ``[2]``, and the carried state.

        The figures are the sum of the losses in nats, without what training adds to them, and the number of targets
        that count of which no other token has a higher score; of CTC 0. Otherwise as ``losses``.
        """
        with self.autocast():
            hidden, carry = self._hidden(inputs, x, starts, carry, False)
            if not self.model_shard.stage.last:
                return hidden, carry
            head, flat = self._chunked_head(targets), targets.flatten()
            scores = hidden if head else self.model.scores(hidden)
        if head:
            dtype = self.half or hidden.dtype
            losses, highest = chunked_evaluation(hidden.flatten(0, 1), head[0], head[1], flat, dtype)
        elif self.spec.loss == "ctc":
            losses = ctc(scores.float(), self.model.lengths(x), targets, weights)
            highest, weights = torch.zeros_like(losses), None
        else:
            losses, highest = self.collectives.evaluated(scores.flatten(0, 1).float(), flat)
        figures = torch.stack([losses, highest.float()])
        counted = figures if weights is None else figures * weights.flatten()
        return counted.sum(1, dtype=torch.float64), carry

    def _hidden(
        self, inputs: torch.Tensor, x: Any, starts: torch.Tensor | None, carry: Any, training: bool
    ) -> tuple[torch.Tensor, Any]:
        """Return the activations of the model's layers and the carried state; see ``losses``."""
        divided = {} if starts is None else {"starts": starts}  # models that aren't divided don't take it
        checkpointing = self.config.train.activation_checkpointing
        return self.model.hidden(inputs, x, carry, training, checkpointing, **divided)

    def _chunked_head(self, targets: torch.Tensor) -> Any:
        """Return the head of the model if the logits of ``targets`` are computed in chunks, else None.

        They are where they are more than one chunk, but not in compiled steps, which write no logits in float32; not
        by ranks that share a vocabulary, which would exchange figures for every chunk; and not in fp16, whose gradients
        have to be scaled before they are rounded.
        """
        if torch.compiler.is_compiling() or self.half == torch.float16 or self.collectives.size > 1:
            return None
        head: Any = getattr(self.model, "head", None)
        if head is None or head[0] is None:
            return None
        return head if targets.numel() > rows_of_chunk(len(head[0]), self.device) else None

    def features(self, batch: Batch) -> dict[str, torch.Tensor] | None:
        """Return what the model reads besides tokens; None where it reads tokens alone."""
        tensors = {name: to_device(array, self.device) for name, array in batch.features.items()}
        if self.config.communication.reduction == "exact":  # the bits of products may depend on where memory begins
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return tensors or None

    def tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the inputs, targets, weights and starts of documents of a batch."""
        optional = batch.weights, batch.document_starts
        weights, starts = (None if array is None else to_device(array, self.device) for array in optional)
        targets = to_device(batch.targets, self.device).to(torch.int64)  # cross_entropy takes no int32
        return to_device(batch.inputs, self.device), targets, weights, starts
