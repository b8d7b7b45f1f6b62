"""The training loop, top to bottom: batch, step, agree, evaluate, save."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hvdlm.checkpoints.save import Saved
from hvdlm.errors import STOPPED
from hvdlm.protocols.task import Task
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch, StepResult
from hvdlm.protocols.world import World
from hvdlm.training.consensus import Consensus
from hvdlm.training.lr_schedule import make_schedule
from hvdlm.training.preflight import versions
from hvdlm.training.rollback import check_replicas, go_back
from hvdlm.training.run import Run
from hvdlm.training.run_folder import Status, open_folder
from hvdlm.training.signals import Signals
from hvdlm.training.summary import Meter, describe, summarise


def train(run: Run, signals: Signals) -> dict[str, Any]:
    """Train from the checkpoint, or from the start, to ``train.steps``; return the summary. All ranks call.

    Where a signal or ``train.max_seconds`` ends the run earlier, it saves first, and the summary says why.
    """
    config, hook, saver = run.config, run.manager.hook, run.saver
    rate, meter, step = make_schedule(config.train), Meter(run.spec.parameters), run.start_step
    open_folder(run)
    control = Consensus(run.world, config.train.max_seconds, signals)
    with Status(run) as status:
        hook.hvdlm_run_started(config=config, world=run.world, info=describe(run, step))
        metrics, saved, stopped = take_up(run, step), step, control.stopped_before()
        while step < config.train.steps and not stopped:
            run.watchdog.step(step + 1)
            row = run.cursor.advance()
            result = do_step(run, step, row, rate(step), meter)
            status.step = step = step + 1
            heard = control.hear()
            stopped = heard.reason
            if saver.active and heard.ready == run.world.size:
                tell_of(run, saver.advance())
            bad = run.guard.heard(heard, run.world.size)
            if bad:
                tell_of(run, saver.finish())
                status.step = step = go_back(run, bad, step)
                continue
            if due(step, config.train.replica_check_every):
                check_replicas(run, step)
            if due(step, config.train.eval_every) and not stopped:
                metrics = evaluate(run, step)
            if due(step, config.checkpoint.every):
                saved = save(run, step, metrics)
            control.tell(row, saver.ready(), result.skipped)
        control.hear()
        if metrics.get("step") != step and not stopped:
            metrics = evaluate(run, step)
        if saved != step:
            save(run, step, metrics)
        tell_of(run, saver.finish())
        summary = summarise(run, meter, metrics, step, stopped)
        run.watchdog.stop()
        hook.hvdlm_run_ended(summary=summary)
        status.ended(stopped, STOPPED if stopped else 0)
    return summary


def take_up(run: Run, step: int) -> dict[str, Any]:
    """Return the figures of the last evaluation; do the one that a stopped run owes. All ranks call."""
    known = run.checkpoint.manifest.get("metrics") if run.checkpoint else None
    owed = run.checkpoint and step and due(step, run.config.train.eval_every) and step < run.config.train.steps
    return evaluate(run, step) if owed and (known or {}).get("step") != step else known or {}


def do_step(run: Run, step: int, row: int, learning_rate: float, meter: Meter) -> StepResult:
    """Do step number ``step`` (from 0) on the batch that begins at ``row``, and tell of it. All ranks call."""
    began, busy = time.perf_counter(), run.world.transfer_seconds()
    result = run.trainable.train_step(micro_batches(run, row), learning_rate, step, run.guard.limit)
    seconds = time.perf_counter() - began
    if busy is not None:
        result.transfer_seconds = run.world.transfer_seconds() - busy  # type: ignore[operator]
    run.guard.add(result)
    meter.add(result, seconds)
    run.manager.hook.hvdlm_step_ended(step=step + 1, result=result, learning_rate=learning_rate, seconds=seconds)
    return result


def due(done: int, every: int) -> bool:
    """Return whether something that happens every ``every`` steps (0: never) happens after ``done``."""
    return every > 0 and done % every == 0


def micro_batches(run: Run, row: int) -> list[Batch]:
    """Return this rank's rows of the global batch that begins at ``row``, cut into micro-batches."""
    first, last = run.rows
    number, before = run.cursor.place(row)
    batch = run.task.batch(number, before + first, before + last)
    size = run.config.train.micro_batch_size or last - first
    return [batch.rows(start, start + size) for start in range(0, last - first, size)]


def evaluate(run: Run, step: int | None = None) -> dict[str, Any]:
    """Return the task's figures on the whole validation split, each data rank doing its share. All ranks call.

    With ``step``, tell of them, and return it among them.
    """
    at = run.mesh.coordinates(run.world.rank)
    place, counts = at["data"], at["tensor"] == 0 and at["pipeline"] == run.mesh.pipeline - 1
    own: Counter[str] = Counter()
    for batch in run.task.validation(place, run.mesh.data):
        own.update(sums_of(run.task, run.trainable, batch))
        run.watchdog.alive()
    metrics = run.task.metrics(over_ranks(run.world, own if counts else {}))
    if step is None:
        return metrics
    run.manager.hook.hvdlm_evaluated(step=step, metrics=metrics)
    return {"step": step, **metrics}


def sums_of(task: Task, trainable: Trainable, batch: Batch) -> dict[str, float]:
    """Return what ``Task.metrics`` adds up of a validation batch."""
    loss, tokens = trainable.eval_step(batch)
    of = f"{batch.corpus}/" if batch.corpus else ""
    return {f"{of}loss": loss, f"{of}tokens": tokens, **task.count(trainable, batch)}


def over_ranks(world: World, own: Mapping[str, float]) -> Counter[str]:
    """Return the sums over all ranks of what each added up. All ranks call."""
    sums: Counter[str] = Counter()
    for part in world.gather_objects(dict(own)):
        sums.update(part)
    return sums


def save(run: Run, done: int, metrics: dict[str, Any]) -> int:
    """Begin to write the checkpoint of step ``done``; return ``done``. All ranks call."""
    began = time.perf_counter()
    meta = {
        "config": run.requested.to_dict(),
        "tokenizer": run.task.tokenizer.hash,
        "vocab": run.config.model.vocab or run.task.vocab,
        "data": run.task.fingerprint,
        "mesh": run.mesh.shape,
        "versions": versions(run.config.framework),
        "cursor": run.cursor.to_json(),
        "guard": run.guard.state(),
        "metrics": metrics,
        **({"base": run.base} if run.base else {}),
    }
    tell_of(run, run.saver.start(done, run.trainable.state(), meta, run.trainable.shards(), began))
    return done


def tell_of(run: Run, saved: list[Saved]) -> None:
    """Tell of checkpoints that have become whole."""
    for one in saved:
        run.manager.hook.hvdlm_checkpoint_saved(
            step=one.step, path=str(one.path), seconds=one.blocked_seconds, total_seconds=one.seconds
        )
