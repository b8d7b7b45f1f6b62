"""Rolling back to a checkpoint after bad steps, and detecting replicas whose parameters diverge."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from hvdlm.checkpoints import agreement
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.errors import RankError
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run import Run, load_state
from hvdlm.training.step_guard import ADVICE


def roll_back(run: Run, bad_rows: Sequence[int], step: int) -> Checkpoint:
    """Load the newest checkpoint that may help, leave out the batches that began at ``bad_rows``; return it.

    All ranks call, while no save is in progress; the last one may have been refused.

    Raises:
        RankError: there is none.
    """
    reason, run.saver.refused = run.saver.refused, None
    reason = reason or (
        f"{len(bad_rows)} step(s) up to step {step} were skipped, because gradients were not finite or spiked"
    )
    choices = (agreement.choose(run.folder, "auto", run.world, steps) for steps in run.guard.excluded(step))
    checkpoint = next(filter(None, choices), None)
    if checkpoint is None:
        raise run.guard.hopeless(reason)
    run.guard.rolled_back(checkpoint.step, checkpoint.manifest.get("guard", {}))
    load_state(checkpoint, run.trainable, run.world, run.mesh)
    run.saver.continue_from(checkpoint)
    before = run.cursor.left_out
    run.cursor = DataCursor.of(checkpoint.manifest, run.config.train.batch_size)
    run.cursor.left_out = sorted({*run.cursor.left_out, *before})
    run.cursor.leave_out(bad_rows)
    batches = [run.cursor.batch_number(row) for row in bad_rows]
    run.manager.hook.hvdlm_rolled_back(step=step, to_step=checkpoint.step, batches=batches)
    if not bad_rows and run.world.rank == 0:
        print(f"hvdlm: {reason}", file=sys.stderr, flush=True)
    return checkpoint


def check_result(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Check that the run's result, after its last step, is finite.

    Raises:
        RankError: ``val_loss`` or a value of the state is not: the last checkpoint was not published.
    """
    loss = metrics.get("val_loss", 0.0)
    fault = run.saver.refused or (None if math.isfinite(loss) else f"after step {step}, val_loss is {loss}")
    if fault:
        raise RankError(f"{fault}. Resume from an earlier checkpoint, with other settings: {ADVICE}")


def check_replicas(run: Run, step: int) -> None:
    """Compare checksums of the parameters with those of all replicas. All ranks call.

    Raises:
        RankError: a rank holds other values than its replicas.
    """
    if run.world.size == 1:
        return
    checksums = {f"parameters/{name}": checksum for name, checksum in run.trainable.fingerprints().items()}
    identities = run.trainable.replicas(checksums)
    sentence = run.comparison.difference({name: identities[name] for name in checksums}, checksums)
    if sentence:
        raise RankError(f"after step {step}, {sentence} Resume from an earlier checkpoint, on another machine.")
