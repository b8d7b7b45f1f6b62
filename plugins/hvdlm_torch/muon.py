"""Muon (Jordan et al. 2024) on a flat vector's matrices, AdamW on its other elements: see ``hvdlm.parallel.muon``.

Every step, each rank orthogonalizes the matrices of which it updates something, those of the same shape together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from hvdlm.config import TrainConfig
from hvdlm.parallel.flat_layout import Elements
from hvdlm.parallel.muon import COEFFICIENTS, EPSILON, ITERATIONS, count, scale_of
from hvdlm.parallel.parameter_groups import UpdateRates
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.protocols.exchange import ShardedExchange
from hvdlm.protocols.group import Group
from hvdlm_torch.optimizers import FlatOptimizer


class Muon:
    """The update of a flat float32 parameter vector by its gradient, both ``[size]``, as ``FlatOptimizer``.

    ``tensor``: the tensor ranks, which shard matrices.
    """

    def __init__(
        self,
        config: TrainConfig,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        rates: UpdateRates,
        state: ShardedState,
        tensor: Group,
    ) -> None:
        assert state.muon is not None
        self._config, self._layout, self._sharded, self._tensor = config, state.muon, state, tensor
        self._gradient = gradient
        layout = state.muon
        short, long = count(layout.short), count(layout.long)
        self._state = {
            kind: parameter.new_zeros(count(layout.owned) if kind == "momentum" else short + long)
            for kind in ("momentum", "first_moment", "second_moment")
        }
        self._parameters = _views(parameter, layout.owned)
        self._gradients = _views(gradient, layout.owned)
        self._momenta = list(self._state["momentum"].split([len(view) for view in self._gradients]))
        self._classes = _classes(rates, layout.owned)
        # Others than matrices: the few elements of biases and norms are updated in copies, embeddings in their place.
        adamw = replace(config, optimizer="adamw")
        moments = [self._state["first_moment"], self._state["second_moment"]]
        self._short: list[tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]] = []  # views, copy, its chunks
        self._adamw = []
        if short:
            for vector in (parameter, gradient):
                views, copy = _views(vector, layout.short), vector.new_zeros(short)
                self._short.append((views, copy, list(copy.split([len(view) for view in views]))))
            own = [moment[:short] for moment in moments]
            of_short = rates.of(layout.short)
            self._adamw.append(FlatOptimizer(adamw, self._short[0][1], self._short[1][1], of_short, state=own))
        begin = short
        for elements in layout.long:
            start, length = elements[1], count([elements])
            vectors = [vector[start : start + length] for vector in (parameter, gradient)]
            own = [moment[begin : begin + length] for moment in moments]
            self._adamw.append(FlatOptimizer(adamw, vectors[0], vectors[1], rates.of([elements]), state=own))
            begin += length

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state by kind: flat float32, of matrices the momentum, of other elements AdamW's moments."""
        return self._state

    @torch.no_grad()
    def update(self, learning_rate: float, step: int, factor: torch.Tensor, applied: torch.Tensor) -> None:
        """Apply the gradient times ``factor`` as update number ``step`` (from 0), or change nothing.

        ``factor`` (float64) and ``applied`` (bool) are scalars on the device. The gradient is overwritten.
        """
        if applied.is_cpu and not applied:
            return
        for views, copy, _ in self._short:
            torch.cat(views, out=copy)
        for optimizer in self._adamw:
            optimizer.update(learning_rate, step, factor, applied)
        for views, _, chunks in self._short[:1]:
            torch._foreach_copy_(views, chunks)
        self._update_matrices(learning_rate, factor.float(), applied)

    def _update_matrices(self, learning_rate: float, factor: torch.Tensor, applied: torch.Tensor) -> None:
        """Apply the orthogonalized momentum."""
        momentum = self._config.momentum_value
        if not applied.is_cpu:  # where the step is skipped, everything is multiplied by 0, and gradients may be NaN
            self._gradient.nan_to_num_(0.0, 0.0, 0.0)
        if self._momenta:  # a shard of ZeRO may have none
            torch._foreach_mul_(self._gradients, factor.where(applied, 0.0))
            torch._foreach_mul_(self._momenta, torch.full_like(factor, momentum).where(applied, 1.0))
            torch._foreach_add_(self._momenta, self._gradients)
            torch._foreach_add_(self._gradients, self._momenta, alpha=momentum)  # Nesterov's momentum, in their place
        directions = self._directions()
        rate = applied.float() * learning_rate
        for scale, decay, indices in self._classes:
            parameters, moved = [self._parameters[i] for i in indices], [directions[i] for i in indices]
            torch._foreach_mul_(parameters, 1.0 - rate * (scale * decay))
            torch._foreach_mul_(moved, rate * scale)
            torch._foreach_sub_(parameters, moved)

    def _directions(self) -> list[torch.Tensor]:
        """Return what the gradient's elements of matrices are replaced by, flat."""
        whole, index = self._whole_matrices(), self._sharded.model_shard.index
        rows: dict[str, torch.Tensor] = {}
        for matrices in self._layout.alike():
            stacked = torch.stack([whole[matrix.slot.name] for matrix in matrices])
            moved = orthogonalized(stacked).mul_(scale_of(matrices[0].shape))
            if lengths := matrices[0].lengths:
                moved = moved.narrow(1 + matrices[0].axis, sum(lengths[:index]), lengths[index])
            names = [matrix.slot.name for matrix in matrices]
            rows |= zip(names, moved.flatten(1).unbind(), strict=True)
        return [rows[slot.name][first:last] for slot, _, (first, last) in self._layout.owned]

    def _whole_matrices(self) -> dict[str, torch.Tensor]:
        """Return all matrices' momentum ``[rows, columns]``, by name, gathered where this rank has a shard of them."""
        local = self._gathered_shards()
        if not self._layout.sharded:
            return local
        sharded, ranks = self._layout.sharded, range(len(self._tensor.ranks))
        own = torch.cat([local[matrix.slot.name].flatten() for matrix in sharded])
        gathered = self._tensor.all_gather(own, "tensor.momentum")
        sizes = [math.prod(matrix.shape_on(rank)) for rank in ranks for matrix in sharded]
        shards = gathered.split(sizes)
        for number, matrix in enumerate(sharded):
            of_ranks = [shards[rank * len(sharded) + number].view(matrix.shape_on(rank)) for rank in ranks]
            local[matrix.slot.name] = torch.cat(of_ranks, matrix.axis)
        return local

    def _gathered_shards(self) -> dict[str, torch.Tensor]:
        """Return this tensor rank's shard of all matrices' momentum, by name."""
        layout = self._sharded.layout
        if self._layout.zero_size == 1:
            slots = [matrix.slot for matrix in self._layout.matrices]
            return {slot.name: self._gradient[slot.start : slot.stop].view(slot.shape) for slot in slots}
        exchange, ranges = cast(ShardedExchange, self._sharded.exchange), self._sharded.shard_ranges
        started = {
            i: exchange.gather_vector(self._gradient[slice(*ranges[i])], i, "momentum") for i in self._layout.buckets
        }
        buckets = {i: handle.wait() for i, handle in started.items()}
        local = {}
        for matrix, index in zip(self._layout.matrices, self._layout.matrix_buckets, strict=True):
            slot, begin = matrix.slot, layout.bucket_range(index)[0]
            local[slot.name] = buckets[index][slot.start - begin : slot.stop - begin].view(slot.shape)
        return local


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Return the approximately nearest orthogonal matrices of ``[count, rows, columns]``, float32 and contiguous.

    Newton-Schulz iterations, in bf16 on GPUs, as the singular values need no more than to come near 1.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    if not matrices.is_cpu:
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float().contiguous()


def _views(vector: torch.Tensor, elements: Sequence[Elements]) -> list[torch.Tensor]:
    return [vector[start : start + last - first] for _, start, (first, last) in elements]


def _classes(rates: UpdateRates, elements: Sequence[Elements]) -> list[tuple[float, float, list[int]]]:
    """Return (factor of the learning rate, weight decay, indices) of the matrices that share them."""
    classes: dict[tuple[float, float], list[int]] = {}
    for index, (_, start, _) in enumerate(elements):
        scale = 1.0 if rates.scales is None else float(rates.scales[start])
        classes.setdefault((scale, float(rates.decays[start])), []).append(index)
    return [(scale, decay, indices) for (scale, decay), indices in classes.items()]
