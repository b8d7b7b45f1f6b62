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

from builders import case, token_batch
from hvdlm.parallel.flat_layout import Shard
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from launching import BACKEND, FRAMEWORK, RANKS

ETA, TIME, WORDS = 0.5, 5, 11
MODEL = {"name": "gpt", "width": 8, "heads": 4, "mlp_width": 8, "bias": False, "initial_scale": 0.3}


def rows() -> Batch:
    return token_batch(1, shape=(4, TIME), vocab=WORDS)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale[..., None, None, :]


def loss(p: dict[str, np.ndarray], batch: Batch) -> Any:
    """Return the mean loss of the GPT of ``hvdlm_language.gpt`` with parameters ``p``, complex or float64.

    One of them may have an additional first dimension, of variants: their losses are returned.
    """
    heads, width = MODEL["heads"], MODEL["width"]

    def by_head(y: np.ndarray) -> np.ndarray:
        return np.swapaxes(y.reshape(*y.shape[:-1], heads, -1), -3, -2)

    p = {name: value[..., None, :, :] if name.endswith("weight") else value for name, value in p.items()}
    x = p["embed.tokens"][..., batch.inputs, :] + p["embed.positions"][..., None, :TIME, :]
    mask = np.triu(np.full((TIME, TIME), -1e30), 1)
    for i in range(sum(name.endswith("mlp_norm.scale") for name in p)):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, w["attention_norm.scale"])
        q, k, v = (by_head(h @ w[f"attention.{projection}.weight"]) for projection in ("query", "key", "value"))
        scores = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(width / heads) + mask)
        a = np.swapaxes((scores / scores.sum(-1, keepdims=True)) @ v, -3, -2)
        x = x + a.reshape(*a.shape[:-2], width) @ w["attention.output.weight"]
        u = norm(x, w["mlp_norm.scale"]) @ w["mlp.up.weight"]
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + gelu @ w["mlp.down.weight"]
    logits = norm(x, p["final_norm.scale"]) @ np.swapaxes(p["embed.tokens"], -1, -2)[..., None, :, :]
    target = np.take_along_axis(logits, np.broadcast_to(batch.targets, logits.shape[:-1])[..., None], -1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - target).mean((-1, -2))


def gradient(p: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Return grad f by complex steps, float64: of all elements of a parameter at once."""
    step, gradients = 1e-30, {}
    for name, value in p.items():
        shifted = value + 1j * step * np.eye(value.size).reshape(value.size, *value.shape)
        gradients[name] = (loss({**p, name: shifted}, batch).imag / step).reshape(value.shape)
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
    share = 4 // mesh.data
    # TensorFlow traces another graph for micro-batches before the last one, which other tests do.
    rows_at_once = share if FRAMEWORK == "tensorflow" and mesh.pipeline == 1 else 1
    options = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 0.0, "batch_size": 4, "micro_batch_size": rows_at_once}
    model = {**MODEL, "layers": max(2, mesh.pipeline)}
    config = layouts.configured(mesh, model, train=options, parallel={"zero": zero})
    config.data.context = TIME
    trainable = layouts.build(world, mesh, config, WORDS)
    first = mesh.coordinates(world.rank)["data"] * share
    states = []
    for after in (False, True):
        if after:
            starts = range(first, first + share, rows_at_once)
            trainable.train_step([rows().rows(i, i + rows_at_once) for i in starts], ETA, 0)
        state, shards = trainable.state(), trainable.shards()
        boxes = {
            n.removeprefix("parameters/"): [[shards[n].shape, shards[n].start, shards[n].extent], a.tolist()]
            for n, a in state.items()
            if n.startswith("parameters/")
        }
        states.append(assemble(world.gather_objects(boxes)))
    return states[0], states[1]


_EXPECTED: dict[tuple[int, int], dict[str, Any]] = {}  # by the number of parameters and of data ranks


def expected(world: World, before: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Return theta - eta (1/n) sum_i grad f_i(theta), which rank 0 computes."""
    key = len(before), n
    if world.rank == 0 and key not in _EXPECTED:
        share = 4 // n
        gradients = [gradient(before, rows().rows(i * share, (i + 1) * share)) for i in range(n)]
        _EXPECTED[key] = {name: (p - ETA * sum(g[name] for g in gradients) / n).tolist() for name, p in before.items()}
    updated = world.broadcast_object(_EXPECTED[key] if world.rank == 0 else None)
    return {name: np.array(value) for name, value in updated.items()}


CASES = layouts.cases(RANKS)
if FRAMEWORK == "tensorflow":  # traces take seconds; two ranks along one axis show what four would
    CASES = [(mesh, zero) for mesh, zero in CASES if not zero and (RANKS == 2 or max(mesh.shape) < RANKS)]

OTHERS: dict[str, str] = {}  # by case, where TensorFlow's ranks are threads
if (FRAMEWORK, RANKS, BACKEND) == ("tensorflow", 4, "threads"):
    OTHERS["2x2x1-zero0"] = "the same layout of four processes"
    OTHERS["1x2x2-zero0"] = "the same layout's curve in test_layouts.py"
    OTHERS["2x1x2-zero0"] = "two processes of 1x1x2, and the same layout's curve in test_layouts.py"


COVERED = [case(layout, covered_by=OTHERS.get(layouts.case_name(layout), "")) for layout in CASES]


@pytest.mark.parametrize("case", COVERED, ids=layouts.case_name)
def test_one_step_equals_the_update_equation(world: World, case: tuple[Mesh, int]) -> None:
    mesh, zero = case
    before, after = step_once(world, mesh, zero)
    theta = expected(world, before, mesh.data)
    assert before.keys() == after.keys() == theta.keys()
    for name, value in theta.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(value - before[name]).max() > 1e-4, name
