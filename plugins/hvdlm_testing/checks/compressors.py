"""Checks of compressors: sums of known gradients, and training with them."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.models.spec import Init, ParamSpec
from hvdlm.parallel.flat_layout import FlatLayout, make_layout
from hvdlm_testing.checks.harness import VOCAB, Findings, Harness
from hvdlm_testing.checks.training import check_steps
from hvdlm_testing.plugin_under_test import PluginUnderTest

_SHAPES = {"wide": (48, 64), "bias": (64,), "tall": (60, 32)}
_FEW, _MANY = 3, 20  # steps after which sums are compared with the dense one


def check_compressor(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check a plugin's compressor in this framework."""
    config = harness.config(plugin)
    chosen = config.communication.compression
    chosen.algorithm, chosen.ratio, chosen.error_feedback = member, chosen.ratio or 0.1, None
    chosen.min_compression = 0.0
    label = f"compressor {member} in {harness.framework_name}"
    compressor = plugins.provided(harness.manager, "compressors")[member](
        chosen, 1, harness.world.rank, harness.world.size
    )
    for name in ("matrices", "biased", "feeds_back"):
        findings.require(isinstance(getattr(compressor, name, None), bool), f"{label}: {name} is not a bool.")
    replicated = getattr(compressor, "replicated", None)
    findings.require(isinstance(replicated, tuple), f"{label}: replicated is not a tuple of names.")
    shape = (48, 64) if compressor.matrices else (48 * 64,)
    payload = compressor.payload_bytes(shape)
    findings.require(
        0 < payload < 4 * 48 * 64, f"{label}: its payload of {list(shape)} is {payload} bytes, dense is {4 * 48 * 64}."
    )
    _check_sums(harness, config, label, bool(compressor.biased or compressor.feeds_back), findings)
    if getattr(compressor, "scatters", False) and harness.world.size > 1:
        _check_shards(harness, config, label, bool(compressor.biased), findings)
    config.model.name = "rnn"
    spec = plugins.find_model(plugins.load(["rnn"]), "rnn")(config.model, VOCAB, config.data.context)
    check_steps(harness, spec, config, label, findings)


def _layout(align: int = 1) -> FlatLayout:
    return make_layout([ParamSpec(n, s, ("a",) * len(s), Init("zeros")) for n, s in _SHAPES.items()], 10**9, align)


def _exchange(harness: Harness, config: Config, align: int = 1) -> Any:
    exchange, layout = harness.exchange(copy.deepcopy(config)), _layout(align)
    exchange.open(layout, np.zeros(layout.size, np.float32))
    return exchange


def _sums(harness: Harness, exchange: Any, gradient: np.ndarray, first: int, last: int) -> list[np.ndarray]:
    sums = []
    for step in range(first, last):
        exchange.begin(step)
        sums.append(np.array(exchange.start(harness.framework.tensor(gradient.copy()), 0).wait()))
    return sums


def _check_sums(harness: Harness, config: Config, label: str, has_feedback: bool, findings: Findings) -> None:
    size = _layout().size
    random = np.random.default_rng(11)
    gradients = (random.normal(size=(harness.world.size, size)) * random.random(size)).astype(np.float32)
    gradient, dense = gradients[harness.world.rank], gradients.sum(0, dtype=np.float64)
    exchange = _exchange(harness, config)
    sums = _sums(harness, exchange, gradient, 0, _FEW)
    state = {name: np.array(array) for name, array in exchange.state().items()}
    sums += _sums(harness, exchange, gradient, _FEW, _MANY)
    first = sums[0]
    if not findings.require(
        first.shape == (size,) and first.dtype == np.float32,
        f"{label}: a sum is {first.dtype} {list(first.shape)}, expected float32 [{size}].",
    ):
        return
    checksums = harness.world.gather_objects(zlib.crc32(np.stack(sums).tobytes()))
    findings.require(
        len(set(checksums)) == 1, f"{label}: ranks get different sums, so that their parameters would diverge."
    )
    repeated = _sums(harness, _exchange(harness, config), gradient, 0, _FEW)
    findings.require(
        np.array_equal(repeated, sums[:_FEW]),
        f"{label}: the same gradients, seed and steps give other sums: draw random numbers from the seed.",
    )
    restored = _exchange(harness, config)
    restored.load_state(state)
    resumed_sum = _sums(harness, restored, gradient, _FEW, _FEW + 1)[0]
    findings.require(
        np.array_equal(resumed_sum, sums[_FEW]),
        f"{label}: after load_state(state()) sums differ: memory() lacks a part of the compressor's state.",
    )
    _check_closeness(np.stack(sums).astype(np.float64), dense, label, has_feedback, findings)


def _check_shards(harness: Harness, config: Config, label: str, biased: bool, findings: Findings) -> None:
    """Check the sums of shards that ZeRO makes of a compressor's payloads, where it can (``scatters``)."""
    config, size = copy.deepcopy(config), _layout(harness.world.size).size
    config.parallel.zero, config.parallel.zero_gather = 1, "fp32"
    random = np.random.default_rng(11)
    gradients = (random.normal(size=(harness.world.size, size)) * random.random(size)).astype(np.float32)
    exchange = _exchange(harness, config, harness.world.size)
    shards = np.stack(_sums(harness, exchange, gradients[harness.world.rank], 0, _MANY))
    sums = np.concatenate(harness.world.gather_objects(shards.tolist()), axis=1)
    label = f"{label} with parallel.zero 1"
    if findings.require(sums.shape == (_MANY, size), f"{label}: shards have {list(sums.shape)} elements, not {size}."):
        _check_closeness(sums, gradients.sum(0, dtype=np.float64), label, biased, findings)


def _check_closeness(sums: np.ndarray, dense: np.ndarray, label: str, has_feedback: bool, findings: Findings) -> None:
    """Check that the mean of the sums is close to the dense sum, or comes closer with more steps of error feedback."""
    means = [sums[:steps].mean(0) for steps in (_FEW, len(sums))]
    early, late = (float(np.linalg.norm(mean - dense) / np.linalg.norm(dense)) for mean in means)
    cosine = float(means[1] @ dense / (np.linalg.norm(means[1]) * np.linalg.norm(dense) + 1e-30))
    findings.require(
        cosine > 0.5,
        f"{label}: the mean of {len(sums)} sums has another direction than the gradient (cosine {cosine:.2f}).",
    )
    close = late < 0.5 or (has_feedback and late < early)
    cause = "it is biased, although biased is False"
    if has_feedback:
        cause = "error feedback does not compensate for what is left out"
    findings.require(
        close,
        f"{label}: the mean of {len(sums)} sums is {late:.2f} from the gradient (of {_FEW}: {early:.2f}): {cause}.",
    )
