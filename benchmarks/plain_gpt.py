"""GPT-2 and the training loop that a careful user of PyTorch writes for one device; nothing of hvdlm.

The architecture is GPT-2's (Radford et al. 2019) without biases, as in nanoGPT: learned positions, norms before each
block, tied embeddings. It is written for speed: one product for query, key and value, fused attention, fused AdamW,
batches copied asynchronously from pinned memory while the step before is computed, the loss read every tenth step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT; the defaults are GPT-2's 124 million parameters, the vocabulary a multiple of 64."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocab: int = 50_304

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        layer = 12 * self.width**2 + 2 * self.width
        return self.layers * layer + (self.vocab + self.context + 1) * self.width

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of the products of a training step per token, without recomputation (PaLM, B).

        6 per parameter of the products, and 12 layers width context for the scores and values of attention.
        """
        products = self.parameters - self.context * self.width  # positions are looked up
        return 6.0 * products + 12.0 * self.layers * self.width * self.context


class Block(nn.Module):
    """A layer: causal attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations ``[rows, time, width]`` of the layer."""
        rows, time, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (t.view(rows, time, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).contiguous().view(rows, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 without biases and dropout, from tokens to the mean loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.final_norm = nn.LayerNorm(sizes.width, bias=False)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.layers) if last else 0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats per token of ``inputs`` and ``targets`` ``[rows, time]``."""
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    @torch.no_grad()
    def copy_from(self, values: Mapping[str, Any]) -> None:
        """Copy parameters with hvdlm's names, arrays of float32, so that both compute the same.

        Matrices are ``[inputs, outputs]`` there; query, key and value are three.
        """
        self.tokens.weight.copy_(torch.as_tensor(values["embed.tokens"]))
        self.positions.weight.copy_(torch.as_tensor(values["embed.positions"]))
        self.final_norm.weight.copy_(torch.as_tensor(values["final_norm.scale"]))
        for number, block in enumerate(self.blocks):
            layer = {n.removeprefix(f"layers.{number}."): torch.as_tensor(v) for n, v in values.items()}
            qkv = [layer[f"attention.{name}.weight"].t() for name in ("query", "key", "value")]
            block.qkv.weight.copy_(torch.cat(qkv))
            block.output.weight.copy_(layer["attention.output.weight"].t())
            block.up.weight.copy_(layer["mlp.up.weight"].t())
            block.down.weight.copy_(layer["mlp.down.weight"].t())
            block.attention_norm.weight.copy_(layer["attention_norm.scale"])
            block.mlp_norm.weight.copy_(layer["mlp_norm.scale"])


@dataclass(frozen=True)
class Settings:
    """How a plain loop trains: rows of a batch, bf16 autocast or fp32, and AdamW's usual values for GPT-2."""

    rows: int = 12
    bf16: bool = True
    compiled: bool = False
    learning_rate: float = 6e-4
    decay_steps: int = 1000
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float = 1.0


class PlainLoop:
    """Trains a ``PlainGPT`` on random windows of ``tokens``.

    Args:
        sizes: sizes of the model
        settings: batch, precision, optimizer
        tokens: ids, ``[length]``
        device: cpu or cuda
        wrap: makes the module that is trained of the model, for example ``DistributedDataParallel``
        seed: of the windows, different on each rank, and of the initial parameters, which wrappers make equal
    """

    def __init__(
        self,
        sizes: Sizes,
        settings: Settings,
        tokens: np.ndarray,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.steps = 0
        self._context = sizes.context
        self._tokens = tokens
        self._device = torch.device(device)
        self._random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.model = PlainGPT(sizes).to(self._device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        rate, betas, epsilon = settings.learning_rate, settings.betas, settings.epsilon
        self._optimizer = torch.optim.AdamW(groups, rate, betas, epsilon, fused=True)
        module = wrap(self.model)
        self._module = torch.compile(module) if settings.compiled else module
        self._batch = self.draw()

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets ``[rows, context]``, int64, of the next batch, on their way to the device."""
        starts = self._random.integers(0, len(self._tokens) - self._context, self.settings.rows)
        windows = np.stack([self._tokens[s : s + self._context + 1] for s in starts]).astype(np.int64)
        return self.move(windows[:, :-1]), self.move(windows[:, 1:])

    def move(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the device; on a GPU, from pinned memory and without waiting."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch in nats per token."""
        context: AbstractContextManager[Any] = nullcontext()
        if self.settings.bf16:
            context = torch.autocast(self._device.type, dtype=torch.bfloat16)
        with context:
            return self._module(inputs, targets)  # type: ignore[no-any-return]

    def step(self) -> float | None:
        """Do one step; every tenth one returns its loss, which waits for the device."""
        settings = self.settings
        progress = min(1.0, self.steps / settings.decay_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        loss = self.loss(*self._batch)
        self._batch = self.draw()  # while the device computes
        loss.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.item() if self.steps % 10 == 0 else None
