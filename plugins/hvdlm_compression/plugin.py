"""Entry point of compression: registers the algorithms and makes the exchanges, which import keras."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import CompressionConfig, Config
from hvdlm.parallel.mesh import levels
from hvdlm.planning.zero_payloads import gathered_as
from hvdlm.plugins import keras_alone
from hvdlm.protocols.compressor import Compressor, CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks

# A built-in compressor is registered by this line and nothing else: its name and its class.
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
    "int4": "int4.Int4",
    "dgc": "dgc.DGC",
    "chunked_top_k": "chunked_top_k.ChunkedTopK",
}


def _maker(path: str) -> CompressorMaker:
    module, name = path.split(".")

    def make(options: CompressionConfig, seed: int, group_rank: int, ranks: int) -> Compressor:
        return getattr(imported(module), name)(options, seed, group_rank, ranks)

    return make


def imported(module: str) -> Any:
    with keras_alone():
        return importlib.import_module(f"hvdlm_compression.{module}")


@hookimpl
def hvdlm_compressors() -> Mapping[str, CompressorMaker]:
    """Return the built-in algorithms."""
    return {name: _maker(path) for name, path in ALGORITHMS.items()}


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse combinations of options that compression does not support."""
    checks.check_levels(config)
    checks.check_compression(config, spec)


@hookimpl(tryfirst=True)
def hvdlm_make_exchange(
    name: str,
    group: Group,
    config: Config,
    compressors: Mapping[str, CompressorMaker],
    index: int,
    subgroup: Callable[[Sequence[int]], Group],
) -> Any:
    """Return the exchange ``all_reduce`` where gradients are compressed or summed in two levels.

    Called before the core's own hook.
    """
    if name != "all_reduce":
        return None
    if 1 < config.parallel.data_per_node < len(group.ranks):
        return make_two_level(group, config, compressors, index, subgroup)
    if config.parallel.zero and len(group.ranks) > 1:
        return make_zero(group, config, compressors, index)
    return make_compressed(group, config, compressors, index)


def make_zero(group: Group, config: Config, compressors: Mapping[str, CompressorMaker], group_rank: int) -> Any:
    """Return ZeRO's exchange where gradients are compressed or parameters are rounded; else None.

    Raises:
        HvdlmError: the compressor can't send shards.
    """
    settings, compressor = config.communication.compression, None
    if settings.algorithm != "none":
        maker = compressors[settings.algorithm]
        compressor = maker(settings, config.train.seed, group_rank, len(group.ranks))
        if not getattr(compressor, "scatters", False):
            raise checks.no_shards(config)
    if compressor is None and gathered_as(config) == "fp32":
        return None
    return imported("zero").CompressedZeroExchange(group, compressor, config, group_rank)


def make_compressed(
    group: Group,
    config: Config,
    compressors: Mapping[str, CompressorMaker],
    group_rank: int,
    across_steps: bool = False,
) -> Any:
    """Return the exchange that compresses gradients, or None where ``config`` chooses no compression.

    ``across_steps``: its sums are started outside of the step's graph, and stay in flight.
    """
    options = config.communication
    if options.compression.algorithm == "none":
        return None
    maker = compressors[options.compression.algorithm]
    compressor = maker(options.compression, config.train.seed, group_rank, len(group.ranks))
    if across_steps and imported("gathered_sums").gathers(compressor):
        return imported("gathered_sums").GatheredSums(group, compressor, options)
    return imported("exchange").CompressedExchange(group, compressor, options)


def make_two_level(
    group: Group,
    config: Config,
    compressors: Mapping[str, CompressorMaker],
    index: int,
    subgroup: Callable[[Sequence[int]], Group],
) -> Any:
    """Return the exchange that sums within nodes, and between them compressed where ``config`` says so.

    ``subgroup``: returns the group of some ranks of ``group``.
    """
    from hvdlm.communication.all_reduce import AllReduceExchange

    per_node = config.parallel.data_per_node
    node, position = divmod(index, per_node)
    within, across = (subgroup(ranks) for ranks in levels(group.ranks, group.ranks[index], per_node))
    # Their collectives are counted as those of the whole axis, by the name's purpose.
    within.traffic = across.traffic = group.traffic
    # The sum over all ranks is divided and multiplied once, by the two-level exchange.
    sums = replace(config.communication, reduction="average", predivide=1.0)
    compressed = make_compressed(across, replace(config, communication=sums), compressors, node)
    between = compressed or AllReduceExchange(across, sums)
    return imported("two_level").TwoLevelExchange(group, within, between, config.communication, position)


def make_outer(
    exchange: str,
    group: Group,
    config: Config,
    compressors: Mapping[str, CompressorMaker],
    group_rank: int,
    learning_rate: float,
    momentum: float,
) -> Any:
    """Return an exchange of parameter differences, which are compressed where ``config`` says so.

    Args:
        exchange: its module and class, as in ``ALGORITHMS``.
        group: the ranks that exchange, in which this rank has the index ``group_rank``.
        config: the run's; its ``communication.local`` may set other figures of the outer optimizer.
        compressors: makers by name.
        group_rank: this rank's index.
        learning_rate, momentum: the outer optimizer's defaults.
    """
    from hvdlm.communication.all_reduce import AllReduceExchange

    options, (module, name) = config.communication, exchange.split(".")
    inner = make_compressed(group, config, compressors, group_rank, across_steps=True) or AllReduceExchange(
        group, options
    )
    if options.local.outer_learning_rate is not None:
        learning_rate = options.local.outer_learning_rate
    if options.local.outer_momentum is not None:
        momentum = options.local.outer_momentum
    make = getattr(imported(module), name)
    return make(group, inner, options.local, learning_rate, momentum, config.train.steps)
