"""Compressors: what becomes of known gradients, and training with them."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
from hvdlm_testing.checks.harness import VOCAB, Checked, Stage
from hvdlm_testing.checks.training import check_steps
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout

_SHAPES = {"wide": (48, 64), "bias": (64,), "tall": (60, 32)}
_FEW, _MANY = 3, 20  # steps


def check_compressor(stage: Stage, subject: Subject, member: str, checked: Checked) -> None:
    """Check a plugin's compressor in this framework."""
    config = stage.config(subject)
    chosen = config.communication.compression
    chosen.algorithm, chosen.ratio, chosen.error_feedback = member, chosen.ratio or 0.1, None
    chosen.min_compression = 0.0
    what = f"compressor {member} in {stage.framework_name}"
    made = plugins.compressors(stage.manager)[member](chosen, 1, stage.world.rank, stage.world.size)
    for name in ("matrices", "biased", "feeds_back"):
        checked.require(isinstance(getattr(made, name, None), bool), f"{what}: {name} is no bool.")
    shape = (48, 64) if made.matrices else (48 * 64,)
    payload = made.payload_bytes(shape)
    checked.require(
        0 < payload < 4 * 48 * 64, f"{what}: its payload of {list(shape)} is {payload} bytes, dense is {4 * 48 * 64}."
    )
    _check_sums(stage, config, what, bool(made.biased or made.feeds_back), checked)
    config.model.name, config.data.context = "rnn", 4  # TensorFlow unrolls it
    spec = plugins.models(plugins.load([]))["rnn"](config.model, VOCAB, config.data.context)
    check_steps(stage, spec, config, what, checked)


def _layout() -> FlatLayout:
    return make_layout([ParamSpec(n, s, ("a",) * len(s), Init("zeros")) for n, s in _SHAPES.items()], 10**9)


def _exchange(stage: Stage, config: Config) -> Any:
    exchange, layout = stage.exchange(copy.deepcopy(config)), _layout()
    exchange.open(layout, np.zeros(layout.size, np.float32))
    return exchange


def _sums(stage: Stage, exchange: Any, gradient: np.ndarray, first: int, last: int) -> list[np.ndarray]:
    found = []
    for step in range(first, last):
        exchange.begin(step)
        found.append(np.array(exchange.start(stage.framework.tensor(gradient.copy()), 0).wait()))
    return found


def _check_sums(stage: Stage, config: Config, what: str, remembers: bool, checked: Checked) -> None:
    size = _layout().size
    random = np.random.default_rng(11)
    everyone = (random.normal(size=(stage.world.size, size)) * random.random(size)).astype(np.float32)
    gradient, dense = everyone[stage.world.rank], everyone.sum(0, dtype=np.float64)
    exchange = _exchange(stage, config)
    sums = _sums(stage, exchange, gradient, 0, _FEW)
    state = {name: np.array(array) for name, array in exchange.state().items()}
    sums += _sums(stage, exchange, gradient, _FEW, _MANY)
    one = sums[0]
    if not checked.require(
        one.shape == (size,) and one.dtype == np.float32,
        f"{what}: a sum is {one.dtype} {list(one.shape)}, expected float32 [{size}].",
    ):
        return
    prints = stage.world.gather_objects(zlib.crc32(np.stack(sums).tobytes()))
    checked.require(len(set(prints)) == 1, f"{what}: ranks get different sums, their parameters would drift apart.")
    again = _sums(stage, _exchange(stage, config), gradient, 0, _FEW)
    checked.require(
        np.array_equal(again, sums[:_FEW]),
        f"{what}: the same gradients, seed and steps give other sums: draw from the seed.",
    )
    resumed = _exchange(stage, config)
    resumed.load_state(state)
    after = _sums(stage, resumed, gradient, _FEW, _FEW + 1)[0]
    checked.require(
        np.array_equal(after, sums[_FEW]),
        f"{what}: after load_state(state()) sums differ: memory() misses what it remembers.",
    )
    _check_closeness(np.stack(sums).astype(np.float64), dense, what, remembers, checked)


def _check_closeness(sums: np.ndarray, dense: np.ndarray, what: str, remembers: bool, checked: Checked) -> None:
    """Check that the mean sum comes near the dense one: at once, or, by error feedback, with the steps."""
    means = [sums[:steps].mean(0) for steps in (_FEW, len(sums))]
    early, late = (float(np.linalg.norm(mean - dense) / np.linalg.norm(dense)) for mean in means)
    along = float(means[1] @ dense / (np.linalg.norm(means[1]) * np.linalg.norm(dense) + 1e-30))
    checked.require(
        along > 0.5, f"{what}: the mean of {len(sums)} sums points elsewhere than the gradient ({along:.2f})."
    )
    near = late < 0.5 or (remembers and late < early)
    how = (
        "error feedback does not make up for what is left out" if remembers else "biased is False, and yet it is biased"
    )
    checked.require(
        near, f"{what}: the mean of {len(sums)} sums is {late:.2f} from the gradient (of {_FEW}: {early:.2f}): {how}."
    )
