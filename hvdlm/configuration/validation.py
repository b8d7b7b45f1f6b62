"""Validation of a configuration before any rank computes; every problem is one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from hvdlm import plugins
from hvdlm.config import Config, TrainConfig
from hvdlm.configuration import ranges
from hvdlm.data import corpora
from hvdlm.errors import HvdlmError, nearest
from hvdlm.io.untrusted_input import shown
from hvdlm.models.lora import adapt
from hvdlm.parallel import layout_checks
from hvdlm.parallel.mesh import Mesh

_BYTES_PER_TOKEN = 8  # of a batch: inputs and targets, int32
_STAND_IN_VOCAB = 256  # checks run before the data is opened


def values(config: Config) -> None:
    """Check every number against its range, and the run's folder.

    Raises:
        HvdlmError: the first problem.
    """
    ranges.check(vars(config))
    if config.train.min_learning_rate_value > config.train.learning_rate:
        raise HvdlmError(
            f"train.min_learning_rate {config.train.min_learning_rate} is above train.learning_rate "
            f"{config.train.learning_rate}: lower it (--train.min_learning_rate), or leave it out, for a tenth."
        )
    one_length(config.train)
    if config.lora.rank is None and (config.lora.alpha is not None or config.lora.layers is not None):
        raise HvdlmError("lora.alpha and lora.layers configure adapters, which lora.rank enables: --lora.rank 8.")
    if config.train.nesterov and not config.train.momentum_value:
        raise HvdlmError("train.nesterov needs train.momentum above 0, for example --train.momentum 0.9.")
    if config.data.mixture is not None:
        corpora.check(config)
        if config.task != "language_model":
            raise HvdlmError(f"data.mixture: the task {config.task} doesn't support mixtures: give it data.path.")
    _documents(config)
    writable(Path(config.log.run), "log.run")


def _documents(config: Config) -> None:
    """Check the options that divide the tokens into documents."""
    data = config.data
    if data.chat is not None and data.prompt is not None:
        raise HvdlmError("data.chat and data.prompt both say which tokens are targets: give one of them.")
    if data.prompt is not None and data.prompt == data.field:
        raise HvdlmError(
            f"data.prompt: {shown(repr(data.prompt))} is also data.field, the completion: name another field for "
            "one of them."
        )
    if data.rows == "documents" and data.sampling != "shuffled":
        raise HvdlmError(
            "data.rows documents: rows that begin with documents are read in shuffled order, and data.sampling is "
            f"{data.sampling}: use --data.sampling shuffled."
        )
    if data.document_masks and (data.sampling != "shuffled" or config.task != "language_model"):
        raise HvdlmError(
            "data.document_masks: they divide the shuffled rows of a language model into documents, and data.sampling "
            f"is {data.sampling}, the task {config.task}: leave it false."
        )


def one_length(train: TrainConfig) -> None:
    """Check that the run has one length.

    Raises:
        HvdlmError: tokens and epochs are given.
    """
    if train.tokens is not None and train.epochs is not None:
        raise HvdlmError("train.tokens and train.epochs both set the length of the run: give one of them.")


def writable(folder: Path, key: str) -> None:
    """Check that ``folder`` is, or can become, a folder that this user can write."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise HvdlmError(f"{key} {folder}: {existing} is a file, not a folder: choose another folder (--{key}).")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise HvdlmError(f"{key} {folder}: {existing} can't be written by this user: choose another folder (--{key}).")


def layout(config: Config, mesh: Mesh) -> None:
    """Check that the batch divides over data ranks and micro-batches, and that a rank's part fits into memory.

    Raises:
        HvdlmError: it doesn't (the sentence names sizes that do), or no machine could hold it.
    """
    batch, data = config.train.batch_size, mesh.data
    if batch % data:
        low, high = batch // data * data, -(-batch // data) * data
        sizes = f"{low} or {high}" if low else str(high)
        raise HvdlmError(f"train.batch_size {batch} can't be split over {data} data ranks: choose {sizes}.")
    rows = batch // data
    tokens, steps = rows * config.data.context, 1 + config.data.prefetch
    if tokens * _BYTES_PER_TOKEN * steps > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise HvdlmError(
            f"train.batch_size {batch} with data.context {config.data.context} is {tokens:,} tokens of a rank in a "
            f"step, and {steps} of these more than this machine's memory holds: lower them (--train.batch_size, "
            "--data.context, --data.prefetch)."
        )
    micro_batches = {"train.micro_batch_size": config.train.micro_batch_size}
    for key, size in (micro_batches | {"communication.exact_rows": config.communication.exact_rows}).items():
        if not rows % (size or rows):
            continue
        small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
        divisors = ", ".join(str(n) for n in sorted({*small, *(rows // n for n in small)}))
        raise HvdlmError(f"{key} {size} doesn't divide the {rows} sequences of a rank: choose one of {divisors}.")
    virtual, count = config.parallel.virtual_stages, rows // (config.train.micro_batch_size or rows)
    if virtual > 1 and count % mesh.pipeline:
        raise HvdlmError(
            f"parallel.virtual_stages {virtual} needs a multiple of parallel.pipeline {mesh.pipeline} micro-batches in "
            f"a step, and a rank has {count}: change train.batch_size or train.micro_batch_size."
        )


def model(config: Config, manager: pluggy.PluginManager) -> None:
    """Check the model's name, sizes and adapters, its layout, and what plugins check (``hvdlm_check``).

    Raises:
        HvdlmError: the first problem.
    """
    maker = plugins.find_model(manager, config.model.name)
    spec = adapt(maker(config.model, _STAND_IN_VOCAB, config.data.context), config.lora)
    plugins.find_optimizer(manager, config.train)
    plugins.find_schedule(manager, config.train)
    layout_checks.check(config, spec)
    manager.hook.hvdlm_check(config=config, spec=spec)


def communication(config: Config, size: int, backend: str, compressors: Mapping[str, Any]) -> None:
    """Check the exchange of gradients against the number of ranks and the backend.

    Raises:
        HvdlmError: an unknown algorithm, or a reduction that this backend or this number of ranks doesn't support.
    """
    options = config.communication
    if options.compression.algorithm not in {"none", *compressors}:
        name = options.compression.algorithm
        advice = plugins.not_loaded("compressors", name) or nearest(name, ("none", *compressors))
        raise HvdlmError(f"communication.compression.algorithm: no plugin provides {name!r}; {advice}")
    if options.reduction == "adasum":
        if backend in ("gloo", "nccl"):
            raise HvdlmError(f"communication.reduction adasum needs MPI, {backend} has no Adasum: use --backend mpi.")
        if size & (size - 1):
            raise HvdlmError(
                f"communication.reduction adasum combines ranks pair by pair, {size} is no power of two: start "
                f"{2 ** (size.bit_length() - 1)} or {2 ** size.bit_length()} ranks."
            )
    if options.autotune_log and not options.autotune:
        raise HvdlmError("communication.autotune_log needs --communication.autotune true.")
