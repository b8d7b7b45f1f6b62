"""The range of every option that is a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown

_LARGEST = 2.0**63  # NaN isn't below it either
_POSITIVE = """
    model.layers model.width model.heads model.kv_heads model.head_width model.mlp_width model.vocab
    model.rotary_scaling_context lora.rank data.vocab_size data.context train.steps train.tokens train.batch_size
    train.micro_batch_size train.decay_every train.decay_start train.eval_tokens train.eval_batch_size train.threads
    parallel.data parallel.pipeline parallel.tensor parallel.context parallel.data_per_node parallel.virtual_stages
    communication.bucket_bytes communication.fusion_bytes communication.compression.rank
    communication.compression.min_elements communication.exact_rows communication.local.steps
    communication.local.fragments checkpoint.keep log.every train.max_skips
"""
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **{key: (lambda v: v >= 1, "1 or more") for key in _POSITIVE.split()},
    # A model is described layer by layer, in this process's memory.
    "model.layers": (lambda v: 1 <= v <= 10_000, "1 to 10,000"),
    "model.dropout": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "model.rotary_base": (lambda v: v > 1, "above 1"),
    "model.rotary_share": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "model.rotary_scaling": (lambda v: v >= 1, "1 or more"),
    "model.rotary_scaling_low": (lambda v: v > 0, "above 0"),
    "model.rotary_scaling_high": (lambda v: v > 0, "above 0"),
    "model.window": (lambda v: v >= 0, "0 (all positions) or more"),
    "model.norm_epsilon": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "model.initial_scale": (lambda v: v > 0, "above 0"),
    "lora.alpha": (lambda v: v > 0, "above 0"),
    "data.validation_share": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "data.max_expansion": (lambda v: v >= 1, "1 or more"),
    "data.prefetch": (lambda v: 0 <= v <= 1000, "0 (none) to 1000"),
    "train.seed": (lambda v: 0 <= v < 2**63, "0 or more"),
    "train.learning_rate": (lambda v: v > 0, "above 0"),
    "train.min_learning_rate": (lambda v: v >= 0, "0 or more"),
    "train.warmup": (lambda v: v >= 0 and (v < 1 or v == int(v)), "whole steps, or a share between 0 and 1"),
    "train.epochs": (lambda v: v > 0, "above 0"),
    "train.cooldown": (lambda v: v > 0 and (v < 1 or v == int(v)), "whole steps, or a share between 0 and 1"),
    "train.decay_factor": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "train.weight_decay": (lambda v: v >= 0, "0 or more"),
    "train.beta1": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train.beta2": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train.epsilon": (lambda v: v > 0, "above 0"),
    "train.momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train.ema": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "train.label_smoothing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train.z_loss": (lambda v: v >= 0, "0 or more"),
    "train.clip": (lambda v: v >= 0, "0 (no clipping) or more"),
    "train.max_seconds": (lambda v: v > 0, "above 0"),
    "train.spike": (lambda v: v == 0 or v > 1, "0 (only what is not finite) or above 1"),
    "train.replica_check_every": (lambda v: v >= 0, "0 (never) or more"),
    "train.eval_every": (lambda v: v >= 0, "0 (only at the end) or more"),
    "communication.max_loss_gap": (lambda v: v >= 0, "0 (lossless only) or more"),
    "communication.cycle_ms": (lambda v: v > 0, "above 0"),
    "communication.timeout": (lambda v: v > 0, "above 0"),
    "communication.stall_check": (lambda v: v >= 1, "1 or more"),
    "communication.predivide": (lambda v: v > 0, "above 0"),
    "communication.ring_bytes": (lambda v: v >= 0, "0 (never) or more"),
    "communication.cache_capacity": (lambda v: v >= 0, "0 (none) or more"),
    "communication.compression.ratio": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "communication.compression.block": (lambda v: v >= 8 and v % 8 == 0, "a multiple of 8"),
    "communication.compression.momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "communication.compression.error_decay": (lambda v: 0 <= v <= 1, "at least 0 and at most 1"),
    "communication.compression.clip": (lambda v: v >= 0, "0 (no clipping) or more"),
    "communication.compression.warmup": (lambda v: v >= 0, "0 or more"),
    "communication.compression.min_compression": (lambda v: v >= 1, "1 or more"),
    "communication.compression.start_after_steps": (lambda v: v >= 0, "0 or more"),
    "communication.local.outer_learning_rate": (lambda v: v > 0, "above 0"),
    "communication.local.outer_momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "communication.local.warmup": (lambda v: v >= 0, "0 or more"),
    "communication.local.overlap": (lambda v: v >= 0, "0 or more"),
    "communication.local.mixing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "checkpoint.every": (lambda v: v >= 0, "0 (only at the end) or more"),
    "checkpoint.keep_best": (lambda v: v >= 0, "0 (none) or more"),
    "log.sample_tokens": (lambda v: v >= 0, "0 (none) or more"),
}


def check(sections: Mapping[str, Any]) -> None:
    """Check every number of some sections of options, given as {name: its dataclass}, against its range.

    Raises:
        HvdlmError: the first number that is out of its range.
    """
    for key, (good, expected) in _RANGES.items():
        section, *names = key.split(".")
        value: Any = reduce(getattr, names, sections[section]) if section in sections else None
        if value is not None and not (abs(value) < _LARGEST and good(value)):
            raise HvdlmError(f"{key} is {shown(value)}, expected {expected}: set --{key}.")
