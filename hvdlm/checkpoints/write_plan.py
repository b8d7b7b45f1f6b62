"""Who writes what of a checkpoint: every piece of every tensor once, by the lowest rank that holds it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlm.checkpoints.safetensors_io import bytes_of
from hvdlm.checkpoints.shards import kind

ENTRY = 512
"""Bytes that a tensor takes, at most, in a header and in the manifest, beside its name and its numbers."""


@dataclass(frozen=True)
class Deal:
    """Who writes what.

    Attributes:
        parts: what every rank writes, {file: names}.
        tensors: the manifest's ``tensors``.
        bytes: what every rank's part takes on disk, at most.
    """

    parts: list[dict[str, list[str]]]
    tensors: dict[str, list[Any]]
    bytes: list[int]


def deal_out(held: Sequence[Mapping[str, Any]]) -> Deal:
    """Return who writes what, from what every rank holds: ``pieces.to_json`` by global name."""
    written: list[tuple[int, str, Any]] = []
    taken = set()
    for rank, entries in enumerate(held):
        for name, entry in entries.items():
            what = (name, json.dumps([entry["start"], entry["extent"], entry["flat"]]))
            if what not in taken:
                taken.add(what)
                written.append((rank, name, entry))
    writers = {(kind(name), rank) for rank, name, _ in written}
    alone = {first for first, count in Counter(first for first, _ in writers).items() if count == 1}
    deal = Deal([{} for _ in held], {}, [0] * len(held))
    for rank, name, entry in written:
        file = f"{kind(name)}.safetensors" if kind(name) in alone else f"{kind(name)}-{rank:04d}.safetensors"
        deal.parts[rank].setdefault(file, []).append(name)
        deal.tensors.setdefault(name, []).append({"file": file, **entry})
        deal.bytes[rank] += bytes_of((entry["dtype"], _extent(entry))) + ENTRY + len(name)
    return deal


def _extent(entry: Mapping[str, Any]) -> tuple[int, ...]:
    flat = entry["flat"]
    return tuple(entry["extent"]) if flat is None else (flat[1] - flat[0],)
