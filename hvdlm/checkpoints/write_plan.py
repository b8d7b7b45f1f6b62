"""Plans which rank writes what of a checkpoint: every shard of every tensor once, by the lowest rank that holds it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlm.checkpoints.safetensors_io import bytes_of
from hvdlm.checkpoints.shards import kind

ENTRY_BYTES = 512
"""Upper bound of a tensor's bytes in a header and in the manifest, beside its name and its elements."""


@dataclass(frozen=True)
class WritePlan:
    """Which rank writes what.

    Attributes:
        files: for every rank the files that it writes, {file: names of tensors}.
        tensors: the manifest's ``tensors``.
        bytes: for every rank an upper bound of the bytes that it writes.
    """

    files: list[dict[str, list[str]]]
    tensors: dict[str, list[Any]]
    bytes: list[int]


def make_write_plan(held: Sequence[Mapping[str, Any]]) -> WritePlan:
    """Return the plan for the shards that every rank holds: {global name: ``shards.to_json``} for each rank."""
    written: list[tuple[int, str, Any]] = []
    seen = set()
    for rank, entries in enumerate(held):
        for name, entry in entries.items():
            identity = (name, json.dumps([entry["start"], entry["extent"], entry["flat"]]))
            if identity not in seen:
                seen.add(identity)
                written.append((rank, name, entry))
    writers = {(kind(name), rank) for rank, name, _ in written}
    writers_of_kind = Counter(kind_ for kind_, _ in writers)
    plan = WritePlan([{} for _ in held], {}, [0] * len(held))
    for rank, name, entry in written:
        file = f"{kind(name)}.safetensors"
        if writers_of_kind[kind(name)] > 1:
            file = f"{kind(name)}-{rank:04d}.safetensors"
        plan.files[rank].setdefault(file, []).append(name)
        plan.tensors.setdefault(name, []).append({"file": file, **entry})
        plan.bytes[rank] += bytes_of((entry["dtype"], _held_shape(entry))) + ENTRY_BYTES + len(name)
    return plan


def _held_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    flat = entry["flat"]
    return tuple(entry["extent"]) if flat is None else (flat[1] - flat[0],)
