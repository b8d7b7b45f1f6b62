"""What ranks check together before they train: that they are one run, and that every group's collectives work."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import zlib
from typing import Any

import numpy as np

from hvdlm.checkpoints.base_weights import Base
from hvdlm.checkpoints.base_weights import check as check_base
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import Config
from hvdlm.errors import HvdlmError, RankError
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.task import Task
from hvdlm.protocols.world import World


def agree(world: World, config: Config, task: Task, base: Base | None = None) -> None:
    """Check that all ranks have the same configuration, data, frozen weights and versions. All ranks call.

    Raises:
        HvdlmError: one has others; the sentence says which rank, and what of it differs.
    """
    settings = config.to_dict()
    settings["train"]["threads"] = 0  # follows from each host's cores
    own = {
        "configuration": zlib.crc32(repr(settings).encode()),
        "tokenizer": task.tokenizer.hash,
        "data": task.fingerprint,
        "pretrained folder": base and base["weights"],
        **versions(config.framework),
    }
    said = world.gather_objects(own)
    for rank, other in enumerate(said):
        for what, value in said[0].items():
            if other.get(what) == value:
                continue
            if what in ("configuration", "tokenizer", "data", "pretrained folder"):
                advice, shown = "give all ranks the same options and files", ""
            else:
                advice, shown = "install the same on all hosts", f" ({other.get(what)}, not {value})"
            raise HvdlmError(f"rank {rank} has another {what} than rank 0{shown}: {advice}.")


def check_groups(world: World, framework: Framework, mesh: Mesh) -> None:
    """Sum a number over every group, so that what can't work fails now. All ranks call.

    Raises:
        RankError: a group's sum is wrong.
    """
    for ranks in dict.fromkeys([tuple(range(world.size)), *mesh.groups()]):
        if world.rank not in ranks or len(ranks) == 1:
            continue
        group = world.group(ranks)
        one = framework.tensor(np.full(1, world.rank + 1.0, np.float32))
        total = float(group.all_reduce_async(one, "check").wait()[0])
        if total != sum(ranks) + len(ranks):
            raise RankError(
                f"a first sum over the ranks {', '.join(map(str, ranks))} gave {total:g}, expected "
                f"{sum(ranks) + len(ranks)}: python -m hvdlm doctor examines Horovod and MPI."
            )
        group.traffic.clear()


def check_continuation(found: Checkpoint, task: Task, config: Config, base: Base | None = None) -> None:
    """Check that a checkpoint's data and frozen weights go on with this run's settings.

    Raises:
        HvdlmError: it has another tokenizer, its place in the data has no meaning here, or its adapters have none.
    """
    check_base(found, base)
    before = found.manifest.get("tokenizer")
    if before and before != task.tokenizer.hash:
        raise HvdlmError(
            f"checkpoint {found.path} was trained with another tokenizer or vocabulary than this run's: use the same "
            "--data.path and --data.tokenizer, or a new --log.run."
        )
    cursor: Any = found.manifest.get("cursor") or {}
    batch = cursor.get("batch_size", config.train.batch_size)
    if config.data.sampling == "sequential" and batch != config.train.batch_size:
        raise HvdlmError(
            f"checkpoint {found.path} read the corpus in {batch} streams, train.batch_size {config.train.batch_size} "
            f"asks for others: with data.sampling sequential, go on with --train.batch_size {batch}."
        )


@functools.cache  # searching what is installed takes milliseconds, for which a save would stand still
def versions(framework: str) -> dict[str, str]:
    """Return the versions of what computes, by distribution name."""
    found = {"python": platform.python_version()}
    for name in ("hvdlm", framework, "tensorflow-cpu", "keras", "horovod", "mpi4py", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
