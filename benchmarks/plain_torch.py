"""The training loop that a careful user of PyTorch and Horovod writes by hand, on hvdlm's model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvdlm.config import ParallelConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.training.run import Run
from hvdlm_torch.collectives import Collectives
from hvdlm_torch.models import make_model


def unsharded_model(run: Run) -> Any:
    """Return the model of ``run`` without sharding, its parameters not yet bound.

    Everything used of hvdlm's PyTorch plugin is called in this function and in ``PlainLoop.loss``.
    """
    layout = make_model_shard(run.spec, Mesh(1, 1, 1), 0, ParallelConfig())
    return make_model(run.spec, layout, Collectives(run.world.group((run.world.rank,)), layout))


class PlainLoop:
    """A tensor per parameter, fused AdamW, one grouped all-reduce after the backward pass."""

    def __init__(self, run: Run) -> None:
        train = run.config.train
        self._tokens = run.task.data.train
        self._context = run.config.data.context
        self._rows = train.batch_size // run.world.size
        self._clip = train.clip
        self._random = np.random.default_rng(run.world.rank)
        values = {p.name: torch.nn.Parameter(torch.from_numpy(p.initial(train.seed))) for p in run.spec.params}
        self._parameters = list(values.values())
        self._model = unsharded_model(run)
        self._model.bind(values)
        decayed = [values[p.name] for p in run.spec.params if p.decay]
        others = [values[p.name] for p in run.spec.params if not p.decay]
        groups = [
            {"params": decayed, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (train.beta1, train.beta2)
        self._optimizer = torch.optim.AdamW(groups, train.learning_rate, betas, train.epsilon, fused=True)
        self._horovod: Any = None
        if run.world.size > 1:
            import horovod.torch

            self._horovod = horovod.torch
        self._step = 0

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch in nats per token."""
        hidden, _ = self._model.hidden(inputs, None, None, True, False)
        return F.cross_entropy(self._model.scores(hidden).flatten(0, 1), targets.flatten())

    def loss_of(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean loss of a batch of arrays, without training."""
        with torch.no_grad():
            return self.loss(torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64))).item()

    def step(self) -> None:
        """Do one step; every tenth one reads the loss, as a user who logs it would."""
        starts = self._random.integers(0, len(self._tokens) - self._context - 1, self._rows)
        windows = np.stack([self._tokens[s : s + self._context + 1] for s in starts]).astype(np.int64)
        inputs, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        for group in self._optimizer.param_groups:
            group["lr"] = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * min(1.0, self._step / 1000)))
        loss = self.loss(inputs, targets)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._horovod:
            gradients = [p.grad for p in self._parameters]
            self._horovod.grouped_allreduce_(gradients, op=self._horovod.Average, name="plain")
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._step += 1
        if self._step % 10 == 0:
            loss.item()
