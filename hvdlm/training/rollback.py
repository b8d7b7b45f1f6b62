"""Rolling back to a checkpoint after bad steps, and detecting replicas whose parameters diverge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hvdlm.checkpoints import agreement
from hvdlm.errors import RankError
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run import Run, load_state
from hvdlm.training.step_guard import ADVICE


def roll_back(run: Run, bad_rows: Sequence[int], step: int) -> int:
    """Load the newest whole checkpoint, leave out the batches that began at ``bad_rows``; return its step.

    All ranks call, while no save is in progress.

    Raises:
        RankError: there is none, or the run was rolled back to it too often.
    """
    checkpoint = agreement.choose(run.folder, "auto", run.world)
    if checkpoint is None:
        raise RankError(
            f"{len(bad_rows)} step(s) up to step {step} were skipped, because gradients were not finite or spiked, and "
            f"there is no checkpoint to go back to: {ADVICE}"
        )
    run.guard.rolled_back(checkpoint.step, checkpoint.manifest.get("guard", {}))
    load_state(checkpoint, run.trainable, run.world, run.mesh)
    run.saver.continue_from(checkpoint)
    before = run.cursor.left_out
    run.cursor = DataCursor.of(checkpoint.manifest, run.config.train.batch_size)
    run.cursor.left_out = sorted({*run.cursor.left_out, *before})
    run.cursor.leave_out(bad_rows)
    batches = [run.cursor.batch_number(row) for row in bad_rows]
    run.manager.hook.hvdlm_rolled_back(step=step, to_step=checkpoint.step, batches=batches)
    return checkpoint.step


def check_replicas(run: Run, step: int) -> None:
    """Compare checksums of the parameters along every data axis. All ranks call.

    Raises:
        RankError: a rank holds other values than its replicas.
    """
    if run.mesh.data == 1:
        return
    own = run.trainable.fingerprints()
    # One number per rank at first; all tensors' checksums are exchanged only where these differ.
    digests = run.world.gather_objects(_digest(own))
    if not any(_differ(digests, ranks) for ranks in _data_axes(run)):
        return
    fingerprints = run.world.gather_objects(own)
    for ranks in _data_axes(run):
        sentence = difference([fingerprints[rank] for rank in ranks], ranks)
        if sentence:
            raise RankError(f"after step {step}, {sentence} Resume from an earlier checkpoint, on another machine.")


def _digest(fingerprints: Mapping[str, int]) -> list[int]:
    return [hash(tuple(fingerprints.values()))] if fingerprints else []


def _data_axes(run: Run) -> list[tuple[int, ...]]:
    """Return the ranks of every data axis."""
    return list(dict.fromkeys(run.mesh.group("data", rank) for rank in range(run.mesh.size)))


def _differ(digests: Sequence[list[int]], ranks: Sequence[int]) -> bool:
    return len({tuple(digests[rank]) for rank in ranks}) > 1


def difference(fingerprints: Sequence[Mapping[str, int]], ranks: Sequence[int]) -> str | None:
    """Return a sentence on the first tensor that differs and the ranks that differ; None where all are equal."""
    for name in fingerprints[0]:
        values = [checksums.get(name) for checksums in fingerprints]
        if len(set(values)) == 1:
            continue
        value, count = Counter(values).most_common(1)[0]
        others = [rank for rank, other in zip(ranks, values, strict=True) if other != value]
        more = sum(len({checksums.get(key) for checksums in fingerprints}) > 1 for key in fingerprints[0]) - 1
        also = f" and {more} more tensor(s)" if more else ""
        if count > len(ranks) - count:
            who = f"rank {', '.join(map(str, others))} holds other values than the other {count} data rank(s)"
        else:
            who = f"ranks {', '.join(map(str, ranks))} hold different values, no majority shows which are right"
        return f"{who} of {name}{also}: a fault of the machine or of a plugin has changed them silently."
    return None
