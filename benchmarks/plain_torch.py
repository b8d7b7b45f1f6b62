"""The loop that a careful user of PyTorch and Horovod writes by hand, over the same model code as hvdlm's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvdlm.training.run import Run
from hvdlm_torch.models import make_model


class PlainLoop:
    """One parameter a tensor, fused AdamW, one grouped all-reduce after the backward pass; nothing of hvdlm's loop."""

    def __init__(self, run: Run) -> None:
        self._c, self._tokens = run.config, run.task.data.train
        self._rows = run.config.train.batch_size // run.world.size
        self._random = np.random.default_rng(run.world.rank)
        self._model: Any = make_model(run.spec)
        values = {p.name: torch.nn.Parameter(torch.from_numpy(p.initial(1))) for p in run.spec.params}
        self._model.bind(values)
        decays = {p.name: p.decay for p in run.spec.params}
        t = run.config.train
        self._parameters = list(values.values())
        groups = [
            {"params": [v for n, v in values.items() if decays[n]], "weight_decay": t.weight_decay},
            {"params": [v for n, v in values.items() if not decays[n]], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, t.learning_rate, (t.beta1, t.beta2), t.epsilon, fused=True)
        self._hvd: Any = None
        if run.world.size > 1:
            import horovod.torch as hvd

            self._hvd = hvd
        self._step = 0

    def step(self) -> None:
        """Do one step; every tenth one looks at the loss, as a user who logs would."""
        context = self._c.data.context
        starts = self._random.integers(0, len(self._tokens) - context - 1, self._rows)
        windows = np.stack([self._tokens[s : s + context + 1] for s in starts]).astype(np.int64)
        inputs, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        for group in self._optimizer.param_groups:
            group["lr"] = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * min(1.0, self._step / 1000)))
        hidden, _ = self._model.hidden(inputs, None, True, False)
        loss = F.cross_entropy(self._model.scores(hidden).flatten(0, 1), targets.flatten())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._hvd:
            self._hvd.grouped_allreduce_([p.grad for p in self._parameters], op=self._hvd.Average, name="plain")
        if self._c.train.clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._c.train.clip)
        self._optimizer.step()
        self._step += 1
        if self._step % 10 == 0:
            loss.item()
