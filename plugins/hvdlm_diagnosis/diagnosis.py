"""Diagnosis of a run that hangs or has ended, from its flight recorders: which ranks wait for which, where, and why.

Pure functions on what ``recorder_reader.read_files`` returns. Members of a group call the same collectives in the same
order: the fault is at the first index where their recordings differ, and everything after it is a consequence.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdlm.diagnostics.flight_recorder import named_ranks, ranks_in
from hvdlm_diagnosis.recorder_reader import Entry, FailureFiles, Recording

Column = dict[int, Entry]
"""A rank's collectives in one group, by index."""

_LIBRARIES = re.compile(r"site-packages|<frozen |/lib/python3")
_MAKES_BATCHES, _TAKES_BATCH = "hvdlm-batches, ", "/training/batches.py"  # a thread of a stack, a file in it
_FRAMES, _RANKS = 6, 8  # shown in a diagnosis; RUN/flight_recorder has all
_CALL_LINES = 4  # of a call in a stack: its file, its source line and marks below that


@dataclass(frozen=True)
class Difference:
    """The first collective at which members of a group did not do the same.

    Attributes:
        ranks: the group's ranks, as text.
        index: the number of the collective in the group.
        entries: each member's collective there; None: the member called none.
        deviating: the members that differ from the majority or from their own earlier order; all if undecidable.
    """

    ranks: str
    index: int
    entries: dict[int, Entry | None]
    deviating: tuple[int, ...]

    @property
    def begun(self) -> float:
        """When the first member called the collective."""
        return min(entry.begun for entry in self.entries.values() if entry)


@dataclass(frozen=True)
class Wait:
    """A rank in a collective, and the members that have not arrived there."""

    rank: int
    entry: Entry
    absent: tuple[int, ...]


def columns(recordings: Mapping[int, Recording]) -> dict[str, dict[int, Column]]:
    """Return every group's columns by its ranks as text; a rank whose recording no longer shows the group has none."""
    groups: dict[str, dict[int, Column]] = {}
    for rank, recording in recordings.items():
        for entry in recording.entries:
            groups.setdefault(entry.ranks, {}).setdefault(rank, {})[entry.index] = entry
    for ranks, members in groups.items():
        group_ranks = ranks_in(ranks)
        for rank, recording in recordings.items():
            if rank in group_ranks and rank not in members and not _is_truncated(recording):
                members[rank] = {}
    return groups


def _is_truncated(recording: Recording) -> bool:
    """Return whether older entries have been overwritten."""
    return bool(recording.entries) and recording.entries[0].sequence > 1


def _key(entry: Entry | None) -> tuple[str, ...] | None:
    """Return what must be equal on all members; for an all-gather the first dimension may differ."""
    if entry is None:
        return None
    shape = entry.shape.partition(",")[2] if entry.operation == "all_gather" else entry.shape
    return (entry.operation, entry.name, shape, entry.dtype)


def first_difference(recordings: Mapping[int, Recording]) -> Difference | None:
    """Return the first difference between members of a group, of all groups the earliest; None: there is none."""
    differences = [_difference(ranks, members) for ranks, members in columns(recordings).items() if ranks]
    return min((difference for difference in differences if difference), key=lambda d: d.begun, default=None)


def _difference(ranks: str, members: dict[int, Column]) -> Difference | None:
    """Return the first difference in a group, from the first index that all recordings still show."""
    if len(members) < 2:
        return None
    start = max(min(column, default=0) for column in members.values())
    last = {rank: max(column, default=-1) for rank, column in members.items()}
    # The indices that occur, not all up to the highest: that one may be damaged.
    for index in sorted(set().union(*members.values())):
        # A rank that recorded later collectives called this one, too: its record is damaged, not missing.
        entries = {rank: c.get(index) for rank, c in sorted(members.items()) if index in c or index > last[rank]}
        if index >= start and len({_key(entry) for entry in entries.values()}) > 1:
            return Difference(ranks, index, entries, _deviating(members, index, entries))
    return None


def _deviating(members: dict[int, Column], index: int, entries: dict[int, Entry | None]) -> tuple[int, ...]:
    """Return the members unlike the majority, else those that never arrived, else those unlike their earlier order."""
    keys = Counter(_key(entry) for entry in entries.values())
    majority, count = keys.most_common(1)[0]
    if 2 * count > len(entries) and majority is not None:
        return tuple(rank for rank, entry in entries.items() if _key(entry) != majority)
    missing = tuple(rank for rank, entry in entries.items() if entry is None)
    if missing:
        return missing
    unusual = tuple(rank for rank in entries if _is_usual(members[rank], index) is False)
    return unusual if 0 < len(unusual) < len(entries) else tuple(entries)


def _is_usual(column: Column, index: int) -> bool | None:
    """Return whether a rank called a collective as in earlier steps; None: it never called one of this name."""
    entry, history = column[index], [column[i] for i in sorted(column) if i < index]
    same_name = [e for e in history if (e.operation, e.name) == (entry.operation, entry.name)]
    if not same_name or not history:
        return None
    if _key(entry) not in {_key(e) for e in same_name}:
        return False
    pairs = {(_key(a), _key(b)) for a, b in itertools.pairwise(history)}
    return (_key(history[-1]), _key(entry)) in pairs


def waiting(recordings: Mapping[int, Recording]) -> list[Wait]:
    """Return every rank that is in a collective, those that wait for others first, the longest wait first.

    All collectives of a graph are in flight while it runs: of these, the first that a member has not arrived at counts.
    """
    groups, waits = columns(recordings), []
    compared = {ranks: _Compared(members, _difference(ranks, members)) for ranks, members in groups.items()}
    for rank, recording in recordings.items():
        in_flight = [entry for entry in recording.entries if not entry.ended]
        own = [Wait(rank, entry, compared[entry.ranks].absent(rank, entry)) for entry in in_flight]
        if own:
            waits.append(next((wait for wait in own if wait.absent), own[0]))
    return sorted(waits, key=lambda wait: (not wait.absent, wait.entry.begun))


class _Compared:
    """A group's columns, and for every member where it called each collective from the first difference on."""

    def __init__(self, members: dict[int, Column], difference: Difference | None) -> None:
        self._last = {rank: max(column, default=-1) for rank, column in sorted(members.items())}
        self._first = math.inf if difference is None else difference.index
        self._called: dict[int, dict[Any, list[int]]] = {rank: {} for rank in self._last}
        for rank, column in members.items():
            for index in sorted(index for index in column if index >= self._first):
                self._called[rank].setdefault(_key(column[index]), []).append(index)

    def absent(self, rank: int, entry: Entry) -> tuple[int, ...]:
        """Return the members that have not begun what ``rank`` is in; after a difference, by count from there."""
        if entry.index < self._first:
            return tuple(other for other, last in self._last.items() if entry.index > last)
        key = _key(entry)
        # A damaged recording may have two entries of one index; the column holds the later, which may have another key.
        count = bisect.bisect_right(self._called[rank].get(key, ()), entry.index)
        return tuple(other for other in self._last if len(self._called[other].get(key, ())) < count)


def describe(entry: Entry) -> str:
    """Return a collective in words: operation, name, shape, ranks, step, call site."""
    call = " ".join(word for word in (entry.operation, entry.name, entry.shape, entry.dtype) if word)
    traced = " (in a graph, traced there)" if entry.in_graph else ""
    return f"{call} of ranks {entry.ranks}, step {entry.step}, called at {entry.site or 'an unknown place'}{traced}"


def explain(files: FailureFiles, now: float) -> str:
    """Return the diagnosis of a hang: which ranks wait in which collective, which are missing and where they are."""
    waits, difference = waiting(files.recordings), first_difference(files.recordings)
    lines = [_headline(waits, now)]
    if difference:
        lines += [_describe_difference(difference)]
    suspects = waits[0].absent if waits else ()
    if not suspects and difference:
        suspects = difference.deviating
    invisible = sorted(set(range(files.size)) - set(files.recordings))
    if invisible:
        lines.append(
            f"The flight recorders of {named_ranks(invisible)} can't be read from here (on other hosts' disks, or "
            "deleted)."
        )
    for rank in (suspects or tuple(files.recordings))[:_RANKS]:
        if rank in files.recordings:
            lines += _describe_rank(files, rank, now)
    return "\n".join(lines)


def explain_refused(files: FailureFiles, now: float) -> list[str]:
    """Return the diagnosis of an error of the transport: ranks that called different collectives, or silent ranks."""
    difference = first_difference(files.recordings)
    if difference and None not in difference.entries.values():
        return [_describe_difference(difference)]
    silent = [rank for rank in files.recordings if rank not in files.failures]
    lines = [_describe_difference(difference)] if difference else []
    for rank in silent[:_RANKS]:
        lines += _describe_rank(files, rank, now)
    return lines


def _headline(waits: Sequence[Wait], now: float) -> str:
    if not waits:
        return "No rank is in a collective."
    entry, absent = waits[0].entry, waits[0].absent
    here = (entry.ranks, entry.index, _key(entry))
    ranks = sorted(wait.rank for wait in waits if (wait.entry.ranks, wait.entry.index, _key(wait.entry)) == here)
    verb = "waits" if len(ranks) == 1 else "wait"
    first_line = f"{named_ranks(ranks)} {verb} for {max(0.0, now - entry.begun):.0f} s in {describe(entry)}."
    if absent:
        return f"{first_line}\nNot arrived there: {named_ranks(absent)}."
    return f"{first_line}\nAll its ranks have begun it: the transport is stuck, or a graph."


def _describe_difference(difference: Difference) -> str:
    """Return the first difference in words, a line for each set of members that did the same."""
    alike: dict[tuple[str, ...] | None, list[int]] = {}
    for rank, entry in difference.entries.items():
        alike.setdefault(_key(entry), []).append(rank)
    lines = [f"  {named_ranks(ranks)}: {_describe_call(difference.entries[ranks[0]])}" for ranks in alike.values()]
    if len(difference.deviating) == len(difference.entries):
        deviating = "it is not clear which of them is right"
    else:
        verb = "differs" if len(difference.deviating) == 1 else "differ"
        deviating = f"{named_ranks(difference.deviating)} {verb} from the expected order"
    head = f"First difference between ranks {difference.ranks}, at collective {difference.index} of their group"
    return "\n".join([f"{head}; {deviating}:", *lines])


def _describe_call(entry: Entry | None) -> str:
    return describe(entry) if entry else "no collective so far"


def _describe_rank(files: FailureFiles, rank: int, now: float) -> list[str]:
    """Return where a rank is: its last collective, its error or its stack."""
    recording = files.recordings[rank]
    if recording.entries:
        last = recording.entries[-1]
        state = f"ended {max(0.0, now - last.ended):.0f} s ago" if last.ended else "in flight"
        collective = f"its last collective, {state}: {describe(last)}"
    else:
        collective = "it has called no collective yet"
    lines = [f"Rank {rank} (step {recording.step}, process {recording.pid} on {recording.host}): {collective}."]
    if rank in files.failures:
        return [*lines, f"  It failed: {files.failures[rank].message.splitlines()[0]}"]
    if rank in files.stacks:
        return [*lines, "  Its stack:", *_shortened(files.stacks[rank])]
    silent = max(0.0, now - recording.heartbeat)
    return [*lines, f"  It left no stack, and its last heartbeat is {silent:.0f} s old: it was stopped or killed."]


def explain_stacks(stacks: Mapping[int, str]) -> str:
    """Return where ranks are that are not connected yet: the innermost calls of each."""
    return "\n".join(
        line for rank, stack in sorted(stacks.items())[:_RANKS] for line in (f"Rank {rank} is in:", *_shortened(stack))
    )


def _shortened(stack: str) -> list[str]:
    """Return the innermost calls of the main thread, calls of libraries only at the very end.

    Where the main thread waits for a batch: those of the thread that makes it.
    """
    calls: list[list[str]] = []
    threads = stack.split("\n\n")
    makers = [thread for thread in threads if thread.startswith(_MAKES_BATCHES) and _TAKES_BATCH in threads[0]]
    for line in (makers or threads)[0].rstrip().splitlines()[1:]:
        if line.startswith("  File ") or not calls:
            calls.append([])
        calls[-1].append("  " + line)
    outside_libraries = [i for i, call in enumerate(calls) if not _LIBRARIES.search(call[0])]
    shown = sorted({*outside_libraries[-_FRAMES:], *range(len(calls))[-2:]})
    return [line for i in shown for line in calls[i][:_CALL_LINES]]


def report(files: FailureFiles) -> str:
    """Return the output of ``doctor --run`` for a run that hung or died: how each rank ended, and the diagnosis."""
    now = max(_last_sign(recording) for recording in files.recordings.values())
    lines = [*files.unreadable]
    for rank, recording in sorted(files.recordings.items()):
        process = f"process {recording.pid} on {recording.host}"
        lines.append(f"rank {rank}: step {recording.step}, {process}, {_describe_end(files, rank, now)}")
    return "\n".join([*lines, "", explain(files, now)])


def _last_sign(recording: Recording) -> float:
    """Return the time of a rank's last heartbeat or record."""
    last = recording.entries[-1] if recording.entries else None
    return max(recording.heartbeat, last.begun if last else 0.0, last.ended if last else 0.0)


def _describe_end(files: FailureFiles, rank: int, now: float) -> str:
    if rank in files.failures:
        return "failed: " + files.failures[rank].message.splitlines()[0]
    recording = files.recordings[rank]
    if recording.entries:
        last = recording.entries[-1]
        collective = f"{'after' if last.ended else 'in'} {describe(last)}"
    else:
        collective = "no collective yet"
    silent = max(0.0, now - _last_sign(recording))
    return f"{collective}; last sign of life {silent:.0f} s before the latest of all ranks"
