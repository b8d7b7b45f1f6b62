"""The update equations of parallel SGD: one step of real ranks against numpy in float64.

theta is a copy of the model, f_i the mean loss on the rows of data rank i, eta the learning rate, n the data ranks:

- data parallel: theta' = theta - eta (1/n) sum_i grad f_i(theta), the same on every rank;
- model parallel: the same theta', each rank holding and updating its slices of it;
- hybrid: the mean over the data axis of gradients whose slices lie on the ranks of the model axes.

Gradients come from complex steps, grad f = Im f(theta + ih) / h, exact to float64 (Squire and Trapp 1998).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_layouts as layouts

from builders import token_batch
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from launching import FRAMEWORK, RANKS

ETA, TIME, WORDS = 0.5, 5, 11
MODEL = {"name": "gpt", "layers": 4, "width": 8, "heads": 4, "mlp_width": 8, "bias": False, "initial_scale": 0.3}


def rows() -> Batch:
    return token_batch(1, shape=(4, TIME), vocab=WORDS)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def loss(p: dict[str, np.ndarray], batch: Batch) -> Any:
    """Return the mean loss of the GPT of ``hvdlm_language.gpt`` with parameters ``p``, complex or float64."""
    heads, width = 4, 8
    x = p["embed.tokens"][batch.inputs] + p["embed.positions"][:TIME]
    mask = np.triu(np.full((TIME, TIME), -1e30), 1)
    for i in range(4):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, w["attention_norm.scale"])
        q, k, v = (
            (h @ w[f"attention.{projection}.weight"]).reshape(len(h), TIME, heads, -1).transpose(0, 2, 1, 3)
            for projection in ("query", "key", "value")
        )
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(width / heads) + mask)
        a = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + a.transpose(0, 2, 1, 3).reshape(x.shape) @ w["attention.output.weight"]
        u = norm(x, w["mlp_norm.scale"]) @ w["mlp.up.weight"]
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + gelu @ w["mlp.down.weight"]
    logits = norm(x, p["final_norm.scale"]) @ p["embed.tokens"].T
    target = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - target).mean()


def gradient(p: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Return grad f by complex steps, float64."""
    step, gradients = 1e-30, {}
    shifted = {name: value.astype(np.complex128) for name, value in p.items()}
    for name, value in shifted.items():
        g = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            value[index] += 1j * step
            g[index] = loss(shifted, batch).imag / step
            value[index] -= 1j * step
        gradients[name] = g
    return gradients


def assemble(shards: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return whole parameters from {name: (box, array)} of every rank; overlapping values have to be equal."""
    parameters: dict[str, np.ndarray] = {}
    for rank_shards in shards:
        for name, (box, array) in rank_shards.items():
            shard = Shard(*(tuple(n) for n in box))
            whole = parameters.setdefault(name, np.full(shard.shape, np.nan))
            known = whole[shard.slices]
            assert np.all(np.isnan(known) | (np.abs(known - array) < 1e-6)), name
            whole[shard.slices] = array
    assert not any(np.isnan(whole).any() for whole in parameters.values())
    return parameters


def step_once(world: World, mesh: Mesh, zero: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return whole parameters before and after one step of SGD on ``mesh``."""
    options = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0, "batch_size": 4, "micro_batch_size": 1}
    config = layouts.configured(mesh, MODEL, train=options, parallel={"zero": zero})
    config.data.context = TIME
    trainable = layouts.build(world, mesh, config, WORDS)
    share = 4 // mesh.data
    first = mesh.coordinates(world.rank)["data"] * share
    states = []
    for after in (False, True):
        if after:
            trainable.train_step([rows().rows(i, i + 1) for i in range(first, first + share)], ETA, 0)
        state, shards = trainable.state(), trainable.shards()
        boxes = {
            n.removeprefix("parameters/"): [[shards[n].shape, shards[n].start, shards[n].extent], a.tolist()]
            for n, a in state.items()
            if n.startswith("parameters/")
        }
        states.append(assemble(world.gather_objects(boxes)))
    return states[0], states[1]


_EXPECTED: dict[int, dict[str, Any]] = {}


def expected(world: World, before: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Return theta - eta (1/n) sum_i grad f_i(theta), which rank 0 computes."""
    if world.rank == 0 and n not in _EXPECTED:
        share = 4 // n
        gradients = [gradient(before, rows().rows(i * share, (i + 1) * share)) for i in range(n)]
        _EXPECTED[n] = {name: (p - ETA * sum(g[name] for g in gradients) / n).tolist() for name, p in before.items()}
    updated = world.broadcast_object(_EXPECTED[n] if world.rank == 0 else None)
    return {name: np.array(value) for name, value in updated.items()}


CASES = [case for case in layouts.cases(RANKS) if case[1] == 0 or FRAMEWORK == "torch"]


@pytest.mark.parametrize("case", CASES, ids=layouts.case_name)
def test_one_step_equals_the_update_equation(world: World, case: tuple[Mesh, int]) -> None:
    mesh, zero = case
    before, after = step_once(world, mesh, zero)
    theta = expected(world, before, mesh.data)
    assert before.keys() == after.keys() == theta.keys()
    for name, value in theta.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(value - before[name]).max() > 1e-4, name
