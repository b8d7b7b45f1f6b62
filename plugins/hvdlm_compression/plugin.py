"""The entry point: names the algorithms and makes the exchanges; only then keras is imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import CompressionConfig, Config
from hvdlm.plugins import keras_alone
from hvdlm.protocols.compressor import Compressor, CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import settings

ALGORITHMS = {
    "fp16": "fp16.Float16",
    "bf16": "bf16.BFloat16",
    "top_k": "top_k.TopK",
    "random_k": "random_k.RandomK",
    "power_sgd": "power_sgd.PowerSGD",
    "scaled_sign": "scaled_sign.ScaledSign",
    "sign_majority": "sign_majority.SignMajority",
    "qsgd": "qsgd.QSGD",
    "int8": "int8.Int8",
    "dgc": "dgc.DGC",
}


def _maker(path: str) -> CompressorMaker:
    module, name = path.split(".")

    def make(options: CompressionConfig, seed: int, index: int, ranks: int) -> Compressor:
        return getattr(_imported(module), name)(options, seed, place, ranks)

    return make


def _imported(module: str) -> Any:
    with keras_alone():
        return importlib.import_module(f"hvdlm_compression.{module}")


@hookimpl
def hvdlm_compressors() -> Mapping[str, CompressorMaker]:
    """Return the built-in algorithms."""
    return {name: _maker(path) for name, path in ALGORITHMS.items()}


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse settings that don't fit together."""
    settings.check_compression(config, spec)


@hookimpl(tryfirst=True)
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Answer to ``all_reduce``, before the core does, where gradients are compressed."""
    return make_compressed(group, config, compressors, index) if name == "all_reduce" else None


def make_compressed(group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int) -> Any:
    """Return the exchange that compresses as ``config`` says, or None."""
    options = config.communication
    if options.compression.algorithm == "none":
        return None
    maker = compressors[options.compression.algorithm]
    compressor = maker(options.compression, config.train.seed, place, len(group.ranks))
    return _imported("exchange").CompressedExchange(group, compressor, options)


def make_local(name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int) -> Any:
    """Return the exchange of rarer synchronisation, its differences compressed where ``config`` says so."""
    from hvdlm.communication.all_reduce import AllReduceExchange

    options = config.communication
    inner = make_compressed(group, config, compressors, index) or AllReduceExchange(group, options)
    rate, momentum = settings.outer(options, name)
    return _imported("local").LocalExchange(group, inner, options.local, rate, momentum, config.train.steps)
