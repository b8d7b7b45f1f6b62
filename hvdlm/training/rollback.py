"""Going back to a checkpoint where steps went wrong, and noticing ranks whose parameters went apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hvdlm.checkpoints import discovery
from hvdlm.errors import RankError
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run import Run, load_state
from hvdlm.training.step_guard import ADVICE


def go_back(run: Run, bad: Sequence[int], step: int) -> int:
    """Load the newest whole checkpoint, leave out the batches that began at rows ``bad``; return its step.

    All ranks call, after as many saves as there were: none is under way.

    Raises:
        RankError: there is none, or the run has gone back to it too often.
    """
    found = discovery.choose(run.folder, "auto", run.world)
    if found is None:
        raise RankError(
            f"{len(bad)} step(s) up to step {step} were skipped, because gradients were not finite or spiked, and "
            f"there is no checkpoint to go back to: {ADVICE}"
        )
    run.guard.go_back(found.step, found.manifest.get("guard", {}))
    load_state(found, run.trainable, run.world, run.mesh)
    before = run.cursor.left_out
    run.cursor = DataCursor.of(found.manifest, run.config.train.batch_size)
    run.cursor.left_out = sorted({*run.cursor.left_out, *before})
    run.cursor.leave_out(bad)
    batches = [run.cursor.place(row)[0] for row in bad]
    run.manager.hook.hvdlm_rolled_back(step=step, to_step=found.step, batches=batches)
    return found.step


def check_replicas(run: Run, step: int) -> None:
    """Compare what the ranks of every data axis hold. All ranks call.

    Raises:
        RankError: a rank holds other values than its replicas.
    """
    if run.mesh.data == 1:
        return
    own = run.trainable.fingerprints()
    said = run.world.gather_objects(_whole(own))
    if not any(_apart(said, line) for line in _lines(run)):
        return
    details = run.world.gather_objects(own)
    for line in _lines(run):
        told = difference([details[rank] for rank in line], line)
        if told:
            raise RankError(f"after step {step}, {told} Go on from an earlier checkpoint, on another machine.")


def _whole(fingerprints: Mapping[str, int]) -> list[int]:
    return [hash(tuple(fingerprints.values()))] if fingerprints else []


def _lines(run: Run) -> list[tuple[int, ...]]:
    """Return the ranks of every data axis."""
    return list(dict.fromkeys(run.mesh.group("data", rank) for rank in range(run.mesh.size)))


def _apart(said: Sequence[list[int]], line: Sequence[int]) -> bool:
    return len({tuple(said[rank]) for rank in line}) > 1


def difference(fingerprints: Sequence[Mapping[str, int]], ranks: Sequence[int]) -> str | None:
    """Return a sentence on the first tensor that differs, and who differs from most; None where all are equal."""
    for name in fingerprints[0]:
        values = [found.get(name) for found in fingerprints]
        if len(set(values)) == 1:
            continue
        value, count = Counter(values).most_common(1)[0]
        others = [rank for rank, found in zip(ranks, values, strict=True) if found != value]
        more = sum(len({found.get(key) for found in fingerprints}) > 1 for key in fingerprints[0]) - 1
        also = f" and {more} more tensor(s)" if more else ""
        if count > len(ranks) - count:
            who = f"rank {', '.join(map(str, others))} holds other values than the other {count} data rank(s)"
        else:
            who = f"ranks {', '.join(map(str, ranks))} hold different values, no majority tells which are right"
        return f"{who} of {name}{also}: a fault of the machine or of a plugin has changed them silently."
    return None
