"""Checks before training, on all ranks together: equal settings and data, working collectives, a fitting checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hvdlm.checkpoints.base_weights import Base
from hvdlm.checkpoints.base_weights import check as check_base
from hvdlm.checkpoints.load import Checkpoint, unknown_parameter
from hvdlm.config import Config, TrainConfig
from hvdlm.errors import HvdlmError, RankError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.framework import Framework, Resolved
from hvdlm.protocols.task import Task
from hvdlm.protocols.world import World

_SAFE = {"train.precision": "fp32", "train.compile": "false"}  # what every machine can do


def agree(world: World, config: Config, task: Task, base: Base | None, resolved: Resolved) -> None:
    """Check that all ranks have the same settings (``resolved`` ones, too), data and versions. All ranks call.

    Raises:
        HvdlmError: a rank differs from rank 0; the sentence names the rank and the difference.
    """
    settings = config.to_dict()
    settings["train"]["threads"] = 0  # follows from each host's cores
    checked = {
        "configuration": zlib.crc32(repr(settings).encode()),
        "tokenizer": task.tokenizer.hash,
        "data": task.fingerprint,
        "pretrained folder": base and base["weights"],
        **versions(config.framework),
        "train.precision": precision(config.train.precision, resolved, None),
        "train.compile": str(resolved.compile).lower(),
    }
    values = world.gather_objects(checked)
    for rank, other in enumerate(values):
        for name, value in values[0].items():
            if other.get(name) == value:
                continue
            if name in ("configuration", "tokenizer", "data", "pretrained folder"):
                advice, shown = "give all ranks the same options and files", ""
            else:
                advice, shown = "install the same on all hosts", f" ({other.get(name)}, not {value})"
                advice = f"their devices differ, set --{name} {_SAFE[name]}" if name in _SAFE else advice
            raise HvdlmError(f"rank {rank} has another {name} than rank 0{shown}: {advice}.")


def check_groups(world: World, framework: Framework, mesh: Mesh) -> None:
    """Sum a number over every group, so that a broken transport fails now. All ranks call.

    Raises:
        RankError: a group's sum is wrong.
    """
    for ranks in dict.fromkeys([tuple(range(world.size)), *mesh.groups()]):
        if world.rank not in ranks or len(ranks) == 1:
            continue
        group = world.group(ranks)
        tensor = framework.tensor(np.full(1, world.rank + 1.0, np.float32))
        total = float(group.all_reduce_async(tensor, "check").wait()[0])
        if total != sum(ranks) + len(ranks):
            raise RankError(
                f"a test sum over the ranks {', '.join(map(str, ranks))} gave {total:g}, expected "
                f"{sum(ranks) + len(ranks)}: python -m hvdlm doctor examines Horovod and MPI."
            )
        group.traffic.clear()


def check_continuation(
    checkpoint: Checkpoint, task: Task, spec: ModelSpec, config: Config, base: Base | None = None
) -> None:
    """Check that a checkpoint's base weights, tokenizer, parameters and data cursor fit this run's settings.

    Raises:
        HvdlmError: one of them doesn't.
    """
    check_base(checkpoint, base)
    before = checkpoint.manifest.get("tokenizer")
    if before and before != task.tokenizer.hash:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} was trained with another tokenizer or vocabulary than this run's: use its "
            "--data.path and --data.tokenizer, or a new --log.run."
        )
    if name := unknown_parameter(checkpoint, spec):
        raise HvdlmError(
            f"checkpoint {checkpoint.path} holds {name}, which this run's model lacks: use the model settings it was "
            "trained with (RUN/config.yaml)."
        )
    cursor: Any = checkpoint.manifest.get("cursor") or {}
    batch = cursor.get("batch_size", config.train.batch_size)
    if config.data.sampling == "sequential" and batch != config.train.batch_size:
        raise HvdlmError(
            f"checkpoint {checkpoint.path} read the corpus in {batch} streams, not in train.batch_size "
            f"{config.train.batch_size}: with data.sampling sequential, resume with --train.batch_size {batch}."
        )


def precision(asked: str, resolved: Resolved, checkpoint: Checkpoint | None) -> Any:
    """Return the precision of a run whose ``train.precision`` is ``asked``: auto keeps that of its checkpoint."""
    before = _options_before(checkpoint).get("precision")
    kept = before if before in ("fp32", "bf16", "fp16") else resolved.precision
    return kept if asked == "auto" else asked


def min_learning_rate(asked: TrainConfig, checkpoint: Checkpoint | None) -> float | None:
    """Return the minimum of a run with the options ``asked``: null keeps that of its checkpoint, if the peak is equal.

    Checkpoints of earlier versions have the minimum 0.0001 whatever the peak.
    """
    before = _options_before(checkpoint)
    kept = before.get("min_learning_rate")
    if asked.min_learning_rate is not None or before.get("learning_rate") != asked.learning_rate:
        return asked.min_learning_rate
    return kept if isinstance(kept, int | float) and 0 <= kept <= asked.learning_rate else None


def _options_before(checkpoint: Checkpoint | None) -> Mapping[str, Any]:
    """Return the options ``train`` that a checkpoint was written with, as far as its manifest has them."""
    config: Any = checkpoint.manifest.get("config") if checkpoint else None
    train = (config or {}).get("train")
    return train if isinstance(train, dict) else {}


@functools.cache  # searching installed distributions takes milliseconds, which would block every save
def versions(framework: str) -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute, by distribution name."""
    installed = {"python": platform.python_version()}
    for name in ("hvdlm", framework, "tensorflow-cpu", "keras", "horovod", "mpi4py", "numpy"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
