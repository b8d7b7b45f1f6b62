"""What ledgers say of a run that hangs, or is dead: who waits for whom, where, and since where they differ.

Pure functions on what ``evidence.read_scene`` returns. Members of a group call the same collectives in the same order,
so the first place at which their columns differ is where the fault began, and what follows is its consequence.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvdlm.diagnostics.failure_files import Scene
from hvdlm.diagnostics.flight_recorder import ranks_in, ranks_text
from hvdlm.diagnostics.recorder_reader import Entry, LedgerView

Column = dict[int, Entry]
"""A rank's collectives in one group, by place."""

_LIBRARIES = re.compile(r"site-packages|<frozen |/lib/python3")
_FRAMES, _RANKS = 6, 8  # how much a diagnosis tells; RUN/flight_recorder has all


@dataclass(frozen=True)
class Difference:
    """The first place at which members of a group did not do the same.

    Attributes:
        ranks: the group's, as text.
        place: the number of the collective in the group.
        entries: what each member did there; None: nothing.
        deviating: who did something else than most, or than it did before; several where that can't be told.
    """

    ranks: str
    place: int
    entries: dict[int, Entry | None]
    deviating: tuple[int, ...]

    @property
    def begun(self) -> float:
        """When the first member came there."""
        return min(entry.begun for entry in self.entries.values() if entry)


def columns(views: Mapping[int, LedgerView]) -> dict[str, dict[int, Column]]:
    """Return every group's columns, by its ranks as text; a rank whose ledger no longer shows the group has none."""
    found: dict[str, dict[int, Column]] = {}
    for rank, view in views.items():
        for entry in view.entries:
            found.setdefault(entry.ranks, {}).setdefault(rank, {})[entry.place] = entry
    for ranks, members in found.items():
        inside = ranks_in(ranks)
        for rank, view in views.items():
            if rank in inside and rank not in members and not _wrapped(view):
                members[rank] = {}
    return found


def _wrapped(view: LedgerView) -> bool:
    return bool(view.entries) and view.entries[0].sequence > 1


def _key(entry: Entry | None) -> tuple[str, ...] | None:
    """Return what must be equal on all members; the lengths that ranks gather may differ."""
    if entry is None:
        return None
    shape = entry.shape.partition(",")[2] if entry.operation == "all_gather" else entry.shape
    return (entry.operation, entry.name, shape, entry.dtype)


def first_difference(views: Mapping[int, LedgerView]) -> Difference | None:
    """Return where members of a group first differ, in the group where that happened first; None: nowhere."""
    found = [_differs(ranks, members) for ranks, members in columns(views).items() if ranks]
    return min((difference for difference in found if difference), key=lambda d: d.begun, default=None)


def _differs(ranks: str, members: dict[int, Column]) -> Difference | None:
    """Compare from where all ledgers still have entries."""
    if len(members) < 2:
        return None
    start = max(min(column, default=0) for column in members.values())
    stop = max(max(column, default=-1) for column in members.values())
    for place in range(start, stop + 1):
        entries = {rank: column.get(place) for rank, column in sorted(members.items())}
        if len({_key(entry) for entry in entries.values()}) > 1:
            return Difference(ranks, place, entries, _deviating(members, place, entries))
    return None


def _deviating(members: dict[int, Column], place: int, entries: dict[int, Entry | None]) -> tuple[int, ...]:
    """Return who is to be asked first: those unlike the majority; those who never came; those unlike themselves."""
    keys = Counter(_key(entry) for entry in entries.values())
    most, count = keys.most_common(1)[0]
    if 2 * count > len(entries) and most is not None:
        return tuple(rank for rank, entry in entries.items() if _key(entry) != most)
    missing = tuple(rank for rank, entry in entries.items() if entry is None)
    if missing:
        return missing
    odd = tuple(rank for rank in entries if _usual(members[rank], place) is False)
    return odd if 0 < len(odd) < len(entries) else tuple(entries)


def _usual(column: Column, place: int) -> bool | None:
    """Return whether a rank did what it had done before; None: it never did anything under this name."""
    entry, history = column[place], [column[p] for p in sorted(column) if p < place]
    named = [e for e in history if (e.operation, e.name) == (entry.operation, entry.name)]
    if not named or not history:
        return None
    if _key(entry) not in {_key(e) for e in named}:
        return False
    pairs = {(_key(a), _key(b)) for a, b in itertools.pairwise(history)}
    return (_key(history[-1]), _key(entry)) in pairs


def waiting(views: Mapping[int, LedgerView]) -> list[tuple[int, Entry, tuple[int, ...]]]:
    """Return (rank, what it is in, who has not arrived there) of every rank in a collective, the longest first.

    A graph's collectives are all under way while it runs: the first is told that somebody has not arrived at.
    """
    groups, found = columns(views), []
    differences = {ranks: _differs(ranks, members) for ranks, members in groups.items()}
    for rank, view in views.items():
        under_way = [entry for entry in view.entries if not entry.ended]
        told = [(rank, e, _absent(groups[e.ranks], rank, e, differences[e.ranks])) for e in under_way]
        found += [next((one for one in told if one[2]), told[0])] if told else []
    return sorted(found, key=lambda one: (not one[2], one[1].begun))


def _absent(members: dict[int, Column], rank: int, entry: Entry, difference: Difference | None) -> tuple[int, ...]:
    """Return the members that have not begun what ``rank`` is in: after a difference, counted from there on."""
    if difference is None or entry.place < difference.place:
        return tuple(r for r, column in sorted(members.items()) if entry.place > max(column, default=-1))
    own = _count(members[rank], entry, difference.place, entry.place)
    return tuple(r for r, c in sorted(members.items()) if _count(c, entry, difference.place, None) < own)


def _count(column: Column, entry: Entry, first: int, last: int | None) -> int:
    return sum(
        _key(e) == _key(entry) for place, e in column.items() if place >= first and (last is None or place <= last)
    )


def describe(entry: Entry) -> str:
    """Return a collective as a sentence's part: operation, name, shape, ranks, step, call site."""
    what = " ".join(part for part in (entry.operation, entry.name, entry.shape, entry.dtype) if part)
    traced = " (in a graph, traced there)" if entry.in_graph else ""
    return f"{what} of ranks {entry.ranks}, step {entry.step}, called at {entry.site or 'an unknown place'}{traced}"


def explain(scene: Scene, now: float) -> str:
    """Return what is to be said of a hang: who waits in what, who has not arrived and where it is, what differs."""
    waits, difference = waiting(scene.views), first_difference(scene.views)
    lines = [_headline(waits, now)]
    if difference:
        lines += [_difference(difference)]
    asked = waits[0][2] if waits and waits[0][2] else tuple(difference.deviating) if difference else ()
    unseen = sorted(set(range(scene.size)) - set(scene.views))
    if unseen:
        lines.append(f"The ledgers of {_ranks(unseen)} can't be seen from here (on other hosts' disks, or deleted).")
    for rank in (asked or tuple(scene.views))[:_RANKS]:
        if rank in scene.views:
            lines += _whereabouts(scene, rank, now)
    return "\n".join(lines)


def refused(scene: Scene, now: float) -> list[str]:
    """Return what is to be said where the transport ended a rank: what ranks handed over, or who is silent."""
    difference = first_difference(scene.views)
    if difference and None not in difference.entries.values():
        return [_difference(difference)]
    silent = [rank for rank in scene.views if rank not in scene.failures]
    lines = [_difference(difference)] if difference else []
    for rank in silent[:_RANKS]:
        lines += _whereabouts(scene, rank, now)
    return lines


def _headline(waits: Sequence[tuple[int, Entry, tuple[int, ...]]], now: float) -> str:
    if not waits:
        return "No rank is in a collective."
    _, entry, absent = waits[0]
    others = sorted(r for r, e, _ in waits if (e.ranks, e.place, _key(e)) == (entry.ranks, entry.place, _key(entry)))
    who = _ranks(others)
    said = f"{who} {'waits' if len(others) == 1 else 'wait'} for {max(0.0, now - entry.begun):.0f} s in"
    if absent:
        return f"{said} {describe(entry)}.\nNot arrived there: {_ranks(absent)}."
    return f"{said} {describe(entry)}.\nAll its ranks have begun it: what is stuck is the transport, or a graph."


def _difference(difference: Difference) -> str:
    """Return the sentence about the first difference, members that did the same together."""
    alike: dict[tuple[str, ...] | None, list[int]] = {}
    for rank, entry in difference.entries.items():
        alike.setdefault(_key(entry), []).append(rank)
    parts = [f"  {_ranks(ranks)}: {_did(difference.entries[ranks[0]])}" for ranks in alike.values()]
    whole = len(difference.deviating) == len(difference.entries)
    verb = "differs" if len(difference.deviating) == 1 else "differ"
    who = "who is right can't be told" if whole else f"{_ranks(difference.deviating)} {verb} from the rule"
    head = f"First difference between the ledgers of ranks {difference.ranks}, at their collective {difference.place}"
    return "\n".join([f"{head}; {who}:", *parts])


def _did(entry: Entry | None) -> str:
    return describe(entry) if entry else "nothing so far"


def _whereabouts(scene: Scene, rank: int, now: float) -> list[str]:
    """Return what is known of where a rank is: its last collective, its failure, its stack."""
    view = scene.views[rank]
    last = view.entries[-1] if view.entries else None
    state = "" if last is None else "under way" if not last.ended else f"ended {max(0.0, now - last.ended):.0f} s ago"
    did = f"its last collective, {state}: {describe(last)}" if last else "it has called no collective yet"
    lines = [f"Rank {rank} (step {view.step}, process {view.pid} on {view.host}): {did}."]
    if rank in scene.failures:
        return [*lines, f"  It failed: {scene.failures[rank].message.splitlines()[0]}"]
    if rank in scene.stacks:
        return [*lines, "  It is in:", *_trimmed(scene.stacks[rank])]
    silent = max(0.0, now - view.heartbeat)
    return [*lines, f"  It left no stack; its last sign of life is {silent:.0f} s old: it was stopped or killed."]


def _trimmed(stack: str) -> list[str]:
    """Return the innermost calls of the main thread, those of libraries only where they are the very last."""
    calls: list[list[str]] = []
    for line in stack.split("\n\n")[0].rstrip().splitlines()[1:]:
        if line.startswith("  File ") or not calls:
            calls.append([])
        calls[-1].append("  " + line)
    own = [i for i, call in enumerate(calls) if not _LIBRARIES.search(call[0])]
    shown = sorted({*own[-_FRAMES:], *range(len(calls))[-2:]})
    return [line for i in shown for line in calls[i]]


def _ranks(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {ranks_text(found)}"


def report(scene: Scene) -> str:
    """Return what ``doctor --run`` says of a hung or dead run: every rank's end, then what a hang's diagnosis says."""
    now = max(_last_sign(view) for view in scene.views.values())
    lines = [*scene.unreadable]
    for rank, view in sorted(scene.views.items()):
        lines.append(f"rank {rank}: step {view.step}, process {view.pid} on {view.host}, {_end(scene, rank, now)}")
    return "\n".join([*lines, "", explain(scene, now)])


def _last_sign(view: LedgerView) -> float:
    last = view.entries[-1] if view.entries else None
    return max(view.heartbeat, last.begun if last else 0.0, last.ended if last else 0.0)


def _end(scene: Scene, rank: int, now: float) -> str:
    if rank in scene.failures:
        return "failed: " + scene.failures[rank].message.splitlines()[0]
    last = scene.views[rank].entries[-1:]
    did = "no collective yet" if not last else f"{'in' if not last[0].ended else 'after'} {describe(last[0])}"
    return f"{did}; last sign of life {max(0.0, now - _last_sign(scene.views[rank])):.0f} s before the latest of all"
