"""Checks the options of compression and infrequent synchronisation against the rest of the configuration."""

from __future__ import annotations

import math
import platform
from typing import Any

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import detect
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.moving_average import not_averaged
from hvdlm.parallel.sharding_rules import tied_names
from hvdlm.planning.zero_payloads import gathered_as
from hvdlm.plugins import SCHEDULES

FRAMEWORKS = ("torch", "tensorflow")  # whose plugins keep the float32 parameters that ZeRO's ranks update
WHOLE = ("power_sgd", "dgc", "chunked_top_k")  # compressors of whole matrices, or with a feedback of their own


def check_compression(config: Config, spec: ModelSpec) -> None:
    """Check the options of the chosen compressor.

    Raises:
        HvdlmError: the first combination that is not supported.
    """
    options = config.communication.compression
    _check_zero(config)
    if options.algorithm == "none":
        return
    _whole_gradients(config, f"compression {options.algorithm}")
    if options.algorithm == "power_sgd":
        _rank(options.rank, spec)
    if options.algorithm == "chunked_top_k":
        _chunk(options.block)
    if options.algorithm == "dgc" and options.momentum and config.train.momentum_value:
        raise HvdlmError(
            "communication.compression.momentum takes the place of train.momentum, both would count it twice: "
            "set --train.momentum 0."
        )


def check_levels(config: Config) -> None:
    """Check what is summed in two levels, and that nodes have as many ranks.

    Raises:
        HvdlmError: the first combination that is not supported, or a node with fewer ranks.
    """
    parallel, options = config.parallel, config.communication
    if parallel.data_per_node == 1:
        return
    levels, algorithm = f"parallel.data_per_node {parallel.data_per_node}", options.compression.algorithm
    wanted: dict[str, tuple[Any, Any, str]] = {
        "communication.exchange": (options.exchange, "all_reduce", "it is not a sum of gradients at every step"),
        "communication.auto": (options.auto, False, "it measures one network"),
        "parallel.zero": (parallel.zero, 0, "ZeRO's shards are those of all data-parallel ranks"),
    }
    for key, (value, needed, reason) in wanted.items():
        if value != needed:
            raise HvdlmError(
                f"{key} {value} can't be summed in two levels, as {levels} asks for: {reason}; set --{key} {needed}."
            )
    if options.reduction not in ("average", "sum"):
        raise HvdlmError(
            f"{levels} sums in two levels, and communication.reduction {options.reduction} has an order of its own: "
            "--communication.reduction average, or --parallel.data_per_node 1."
        )
    if algorithm == "power_sgd":
        raise HvdlmError(
            f"{levels} sums shards of buckets between nodes, and compression power_sgd whole matrices: choose another, "
            "for example int8, or --parallel.data_per_node 1."
        )
    launch = detect()
    needed = parallel.data_per_node * parallel.pipeline * parallel.tensor
    if launch is not None and launch.local_size % needed:
        raise HvdlmError(
            f"{levels} needs a multiple of {needed} ranks on every node, and {platform.node()} has "
            f"{launch.local_size}: set it to the data-parallel ranks that a node has."
        )


def _check_zero(config: Config) -> None:
    """Refuse roundings of parameters that nobody gathers or whose float32 copies nobody keeps; sums that ZeRO lacks."""
    parallel, algorithm = config.parallel, config.communication.compression.algorithm
    if parallel.zero_gather is not None and not parallel.zero:
        raise HvdlmError(
            f"parallel.zero_gather {parallel.zero_gather} is how ZeRO's ranks gather parameters, and without ZeRO they "
            "gather none: set --parallel.zero 1, or leave it out."
        )
    if parallel.zero and algorithm in WHOLE:
        raise no_shards(config)
    if parallel.zero and gathered_as(config) != "fp32" and config.framework not in FRAMEWORKS:
        raise HvdlmError(
            f"parallel.zero_gather {gathered_as(config)}: the plugin of framework {config.framework} saves the rounded "
            "parameters that it computes with, and not the float32 ones: set --parallel.zero_gather fp32."
        )


def no_shards(config: Config) -> HvdlmError:
    """Return the error about a compressor whose payloads can't be sent by shards."""
    algorithm, zero = config.communication.compression.algorithm, config.parallel.zero
    return HvdlmError(
        f"communication.compression.algorithm {algorithm} doesn't go with parallel.zero {zero}: ZeRO's ranks send each "
        f"other payloads of single shards, and {algorithm} sums or corrects whole gradients. Choose another, for "
        "example int8, or --parallel.zero 0."
    )


def check_rounds(config: Config) -> None:
    """Check that evaluations and checkpoints fall on steps after which all ranks have the same parameters.

    Raises:
        HvdlmError: the first combination that is not supported.
    """
    local, name = config.communication.local, config.communication.exchange
    every = local.steps
    _whole_gradients(config, name)
    _no_average(config)
    for key, value in (("fragments", local.fragments), ("overlap", local.overlap), ("mixing", local.mixing)):
        if value is not None:
            raise HvdlmError(
                f"communication.local.{key} is an option of streaming_diloco, and {name} has no fragments: leave it "
                "out, or choose --communication.exchange streaming_diloco."
            )
    for key, value in (("train.eval_every", config.train.eval_every), ("checkpoint.every", config.checkpoint.every)):
        if value % every:
            nearest = max(every, round(value / every) * every)
            raise HvdlmError(
                f"{key} {value} falls between two synchronisations of {name}, where ranks differ: choose a multiple of "
                f"communication.local.steps {every}, for example {nearest}."
            )


def _no_average(config: Config) -> None:
    """Refuse the moving average of parameters that ranks don't agree on."""
    if config.train.ema is not None:
        raise not_averaged(config.communication.exchange)


def _chunk(block: int | None) -> None:
    """Refuse chunks whose indices have more than 12 bits."""
    if block is not None and block > 4096:
        raise HvdlmError(
            f"communication.compression.block is {block}, and chunked_top_k's indices of 12 bits allow 4096 at most: "
            "leave it out, for 4096."
        )


def check_streaming(config: Config, spec: ModelSpec) -> None:
    """Check the options of exchanges whose fragments synchronise in turn.

    Raises:
        HvdlmError: the first combination that is not supported.
    """
    local, name = config.communication.local, config.communication.exchange
    _whole_gradients(config, name)
    _no_average(config)
    for key, value, most in (
        ("fragments", local.fragments, local.steps),
        ("overlap", local.overlap, local.steps - 1),
    ):
        if value is not None and value > most:
            raise HvdlmError(
                f"communication.local.{key} is {value}, and with communication.local.steps {local.steps} {name} can "
                f"have {most} at most: a fragment is sent once in that many steps, and has to arrive before."
            )
    _check_tied(config, spec, "would synchronise the two stages' copies of the tied embedding after different steps")


def _check_tied(config: Config, spec: ModelSpec, reason: str) -> None:
    """Refuse a pipeline whose first and last stages both hold the embedding."""
    if tied_names(spec, config.parallel.pipeline):
        raise HvdlmError(
            f"{config.communication.exchange} {reason}: --model.tie_embeddings false, or --parallel.pipeline 1."
        )


def check_updates(config: Config, spec: ModelSpec) -> None:
    """Check that nothing changes the directions that an exchange of updates returns, or their size.

    Raises:
        HvdlmError: the first combination that is not supported.
    """
    name, train, options = config.communication.exchange, config.train, config.communication
    _whole_gradients(config, name)
    wanted: dict[str, tuple[Any, Any, str]] = {
        "train.optimizer": (train.optimizer, "sgd", f"{name} computes the update itself"),
        "train.momentum": (train.momentum or 0.0, 0.0, f"{name} keeps the momentum itself"),
        "train.groups": (train.groups or None, None, f"{name} has one rule for all parameters"),
        "train.clip": (train.clip, 0.0, f"the norm of the gradients is not known to {name}, which sends momentum"),
        "communication.reduction": (options.reduction, "average", f"{name} averages"),
        "communication.predivide": (options.predivide, 1.0, f"{name} doesn't sum gradients"),
        "communication.compression.algorithm": (options.compression.algorithm, "none", f"{name} compresses by itself"),
        "task": (config.task, "language_model", f"{name} weights all steps alike, which padding would falsify"),
    }
    for key, (value, needed, reason) in wanted.items():
        if value != needed:
            wish = f"{needed:g}" if isinstance(needed, float) else "null" if needed is None else needed
            raise HvdlmError(
                f"{key} {shown(value)} doesn't go with communication.exchange {name}: {reason}; set --{key} {wish}."
            )
    _check_tied(config, spec, "makes updates of the gradients that a stage has, and those of a tied embedding are two")


def check_rates(config: Config) -> None:
    """Check that all learning rates are known before the run, and refuse options without a meaning for 0/1 Adam.

    Raises:
        HvdlmError: the first combination that is not supported.
    """
    name, train, options = config.communication.exchange, config.train, config.communication
    if train.schedule not in SCHEDULES:
        raise HvdlmError(
            f"train.schedule {train.schedule} doesn't go with communication.exchange {name}, which has to know all "
            f"learning rates before the run, and a plugin's it doesn't: choose one of {', '.join(SCHEDULES)}."
        )
    unwanted = {
        "train.spike": (train.spike, "others have counted a step that is left out", "set it to 0"),
        "communication.compression.start_after_steps": (
            options.compression.start_after_steps,
            "it has no dense first stage",
            "leave it out",
        ),
        "communication.local.outer_momentum": (
            options.local.outer_momentum,
            "it has no outer optimizer",
            "leave it out",
        ),
        "communication.local.outer_learning_rate": (
            options.local.outer_learning_rate,
            "it has no outer optimizer",
            "leave it out",
        ),
    }
    for key, (value, reason, remedy) in unwanted.items():
        if value:
            raise HvdlmError(f"{key} {value:g} doesn't go with communication.exchange {name}: {reason}; {remedy}.")


def _whole_gradients(config: Config, feature: str) -> None:
    """Refuse options that need every step's whole gradient."""
    if config.communication.reduction == "adasum":
        raise HvdlmError(
            f"communication.reduction adasum combines whole gradients, which {feature} does not provide: choose "
            f"--communication.reduction average, or leave out {feature}."
        )
    if config.train.precision == "fp16":
        raise HvdlmError(
            f"{feature} keeps state from step to step, which the loss scale of train.precision fp16 would falsify: use "
            "--train.precision bf16 or fp32."
        )


def _rank(rank: int, spec: ModelSpec) -> None:
    """Refuse a rank that no matrix of the model has."""
    matrices = [(p.shape[0], math.prod(p.shape[1:])) for p in spec.params if len(p.shape) > 1]
    largest = max((min(shape) for shape in matrices), default=0)
    if rank > largest:
        raise HvdlmError(
            f"communication.compression.rank {rank} is larger than the rank of every matrix of the model "
            f"({largest} at most): choose a small one, for example 4."
        )
