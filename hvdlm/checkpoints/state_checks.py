"""Checks of a copied training state before it is published: every value is finite, and replicas are equal.

Two ranks that hold the same shard of the same global array are replicas of it: data-parallel ranks, but also tensor
ranks that each hold a whole norm scale, or the first and the last pipeline stage with their tied embedding.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hvdlm.parallel.flat_layout import Shard
from hvdlm.protocols.world import World

# Elements that are checked while they are in the processor's cache: 6 GB/s for both checks of float32, of which CRC-32
# takes most. SHA-256, which files get, computes 2 GB/s, BLAKE2b 1.4.
_CHUNK = 2**18

Frozen = Callable[[], Iterable[tuple[str, np.ndarray]]]


def inspect(array: np.ndarray, compared: bool) -> tuple[bool, int]:
    """Return whether all values of ``array``, of any shape and dtype, are finite; and their CRC-32 if ``compared``."""
    flat = np.ascontiguousarray(array).reshape(-1)
    may_be_infinite = flat.dtype.kind not in "iub"  # bfloat16 is of kind V
    finite, checksum = True, 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        finite = finite and not (may_be_infinite and not np.isfinite(chunk).all())
        if compared:
            checksum = zlib.crc32(chunk.view(np.uint8).data, checksum)
    return finite, checksum


@dataclass
class Copied:
    """The copy of the training state that one save writes.

    Attributes:
        state, shards, replicas, frozen: see ``Saver.start``.
        checksums: CRC-32 of the arrays that other ranks hold too, by name, once ``check`` has computed them.
    """

    state: dict[str, np.ndarray]
    shards: Mapping[str, Shard]
    replicas: Mapping[str, str]
    frozen: Frozen
    checksums: dict[str, int] = field(default_factory=dict)

    def check(self, compared: set[str]) -> str | None:
        """Compute the checksums of ``compared``; return the name of an array that is not finite, or None."""
        for name, array in self.state.items():
            finite, checksum = inspect(array, name in compared)
            if not finite:
                return name
            if name in compared:
                self.checksums[name] = checksum
        for name, array in self.frozen() if compared else ():
            self.checksums[name] = inspect(array, True)[1]
        return None


def not_finite(names: Sequence[str | None], step: int) -> str | None:
    """Return a sentence on the first rank whose ``Copied.check`` returned a name, or None where none did."""
    for rank, name in enumerate(names):
        if name:
            return (
                f"{name.removeprefix('parameters/')} on rank {rank} is not finite after step {step}: its checkpoint is "
                "not published, earlier checkpoints are unchanged"
            )
    return None


class Replicas:
    """Which ranks hold copies of which arrays, and the comparison of their checksums.

    ``identities``: for every rank {name: identity}; ranks with the same identity of a name hold equal arrays.
    """

    def __init__(self, identities: Sequence[Mapping[str, str]]) -> None:
        holders: dict[tuple[str, str], list[int]] = {}
        for rank, entries in enumerate(identities):
            for entry in entries.items():
                holders.setdefault(entry, []).append(rank)
        groups: dict[tuple[int, ...], list[str]] = {}
        for (name, _), ranks in holders.items():
            if len(ranks) > 1:
                groups.setdefault(tuple(ranks), []).append(name)
        self._groups = groups

    def of(self, rank: int) -> Iterator[list[str]]:
        """Yield the names of arrays that ``rank`` and the same other ranks hold, group by group."""
        return (names for ranks, names in self._groups.items() if rank in ranks)

    def digests(self, rank: int, checksums: Mapping[str, int]) -> list[int]:
        """Return one number for each group of ``rank``, from the checksums of its arrays."""
        return [zlib.crc32(repr([checksums[name] for name in names]).encode()) for names in self.of(rank)]

    def differ(self, digests: Sequence[Iterable[int]]) -> bool:
        """Return whether ``digests`` of all ranks differ within a group."""
        left = [iter(numbers) for numbers in digests]
        different = [len({next(left[rank]) for rank in ranks}) for ranks in self._groups]
        return max(different, default=1) > 1

    def difference(self, checksums: Sequence[Mapping[str, int]]) -> str | None:
        """Return ``difference`` of the first group whose ``checksums`` differ, or None."""
        for ranks, names in self._groups.items():
            sentence = difference([{name: checksums[rank][name] for name in names} for rank in ranks], ranks)
            if sentence:
                return sentence
        return None

    def compare(self, digests: Sequence[list[int]], checksums: Mapping[str, int], world: World) -> str | None:
        """Compare all ranks' ``digests``, and only where they differ, their ``checksums``. All ranks call.

        Returns:
            ``difference`` of the first group whose checksums differ, or None.
        """
        return self.difference(world.gather_objects(dict(checksums))) if self.differ(digests) else None


class Comparison:
    """Compares checksums of a run's replicas; who holds what is exchanged only where that has changed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[tuple[str, ...], Replicas] = {}

    def difference(self, identities: Mapping[str, str], checksums: Mapping[str, int]) -> str | None:
        """Return ``difference`` of arrays with these ``identities`` and ``checksums``, or None. All ranks call."""
        described = hashlib.sha256(json.dumps(dict(identities)).encode()).hexdigest()
        ranks = tuple(self._world.gather_objects(described))
        if ranks not in self._known:
            self._known[ranks] = Replicas(self._world.gather_objects(dict(identities)))
        replicas = self._known[ranks]
        digests = self._world.gather_objects(replicas.digests(self._world.rank, checksums))
        return replicas.compare(digests, checksums, self._world)


def difference(checksums: Sequence[Mapping[str, int]], ranks: Sequence[int]) -> str | None:
    """Return a sentence on the first tensor that differs and the ranks that differ; None where all are equal."""
    differing = [name for name in checksums[0] if len({numbers.get(name) for numbers in checksums}) > 1]
    if not differing:
        return None
    name = differing[0]
    values = [numbers.get(name) for numbers in checksums]
    value, count = Counter(values).most_common(1)[0]
    others = [rank for rank, other in zip(ranks, values, strict=True) if other != value]
    also = f" and {len(differing) - 1} more tensor(s)" if len(differing) > 1 else ""
    if count > len(ranks) - count:
        who = f"rank {', '.join(map(str, others))} holds other values than the other {count} replica(s)"
    else:
        who = f"ranks {', '.join(map(str, ranks))} hold different values, no majority shows which are right"
    return (
        f"{who} of {name.removeprefix('parameters/')}{also}: a fault of the machine or of a plugin has changed them "
        "silently."
    )
