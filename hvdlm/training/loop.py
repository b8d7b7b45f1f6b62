"""The training loop, top to bottom: batch, step, consensus, evaluation, checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvdlm import plugins
from hvdlm.checkpoints.save import Saved
from hvdlm.diagnostics.phases import TRAINING, process
from hvdlm.errors import STOPPED
from hvdlm.protocols.task import Task
from hvdlm.protocols.trainable import CountsCorrect, HasMovingAverage, Trainable
from hvdlm.protocols.types import Batch, StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.observers import Observers
from hvdlm.training.batches import Batches
from hvdlm.training.consensus import Consensus
from hvdlm.training.lockstep import in_lockstep
from hvdlm.training.lr_schedule import make_schedule
from hvdlm.training.preflight import versions
from hvdlm.training.reports import Reports
from hvdlm.training.rollback import check_replicas, check_result, roll_back
from hvdlm.training.run import Run
from hvdlm.training.run_control import RunControl
from hvdlm.training.run_folder import Status, open_folder
from hvdlm.training.signals import Signals
from hvdlm.training.summary import RunTotals, describe, summarise


def train(run: Run, signals: Signals) -> dict[str, Any]:
    """Train from the checkpoint, or from the start, to ``train.steps``; return the summary. All ranks call.

    Where a signal or ``train.max_seconds`` ends the run earlier, it saves first, and the summary says why. Where a
    plugin does, the run ends as after its last step. While steps are skipped, the run neither saves nor stops. The
    status is ``done`` or ``stopped`` once everything is written.

    Raises:
        RankError: the result is not finite, or rollbacks did not help.
    """
    config, hook, saver = run.config, run.manager.hook, run.saver
    rate = make_schedule(config.train, plugins.find_schedule(run.manager, config.train))
    totals, step = RunTotals(run), run.start_step
    open_folder(run)
    control = RunControl(run)
    consensus = Consensus(run.world, config.train.max_seconds, signals, control)
    observers = Observers(run.world.rank)
    with Status(run, observers, signals) as status, run.closing, Batches(run) as batches:
        run.manager.register(status)
        observers.protect_run(run.manager)
        hook.hvdlm_run_started(config=config, world=run.world, info=describe(run, step), run=control)
        metrics, saved, stopped = last_metrics(run, step), step, consensus.stopped_before()
        save_due, finish, reports = False, 0, Reports(run, totals, consensus, control)
        process.begin(TRAINING)
        while step < config.train.steps and not stopped and not finish:
            process.step(step + 1)
            row = run.cursor.advance()
            result = do_step(run, step, row, batches, rate(step), reports)
            status.step = step = step + 1
            votes = consensus.result()
            stopped = votes.stop_reason
            if stopped:
                status.interrupted(stopped)
            if saver.active and votes.ready == run.world.size:
                report_saved(run, saver.advance())
            finish, save_asked, evaluate_asked = control.due(votes.finish, votes.save, votes.evaluate)
            save_due = save_due or due(step, config.checkpoint.every) or save_asked
            evaluating = evaluate_asked or due(step, config.train.eval_every)
            checking = due(step, config.train.replica_check_every)
            if stopped or save_due or finish or evaluating or checking or saver.refused:
                reports.report()
            deferred = bool(stopped or save_due or finish) and run.world.any(not (result.applied or result.empty))
            if deferred:
                stopped, finish = None, 0  # the next steps decide whether the run rolls back
            wrong = step == config.train.steps and run.world.any(result.failed)
            bad_rows = run.guard.bad_rows(votes, run.world.size, row if wrong else None)
            if bad_rows or saver.refused:
                reports.report()
                reports.vote(undone=True)
                report_saved(run, saver.finish())
                checkpoint = roll_back(run, bad_rows, step)
                status.step = step = saved = checkpoint.step
                metrics, save_due, finish = checkpoint.manifest.get("metrics") or {}, False, 0
                continue
            saving = save_due and not deferred
            if checking and not saving:  # a save compares all of the state
                check_replicas(run, step)
            if evaluating and not stopped:
                limit = None if finish or step == config.train.steps else config.train.eval_tokens
                metrics = evaluate(run, step, limit)
            if saving:
                saved, save_due = save(run, step, metrics), False
            reports.vote()
        consensus.result()
        if metrics.get("step") != step and not stopped:
            metrics = evaluate(run, step)
        report_saved(run, saver.finish())
        check_result(run, step, {} if stopped else metrics)
        if saved != step:
            save(run, step, metrics)
        report_saved(run, saver.finish())
        check_result(run, step, {})
        ended_early = control.agreed_reason() if finish and step < config.train.steps else None
        summary = summarise(run, totals, metrics, step, stopped) | {"ended_early": ended_early}
        run.check_folder()
        if stopped:  # before plugins: the launcher may give no time for them
            status.ended(stopped, STOPPED)
        process.begin("ending the run: hvdlm_run_ended of plugins")
        hook.hvdlm_run_ended(summary=summary)
        with process.during("waiting for plugins on other ranks to end", patience=2.0, waits=True):
            run.world.gather_objects(None)  # the run is done where all ranks are
        if not stopped:
            run.check_folder()
            status.ended(ended_early, 0)
    return summary


def last_metrics(run: Run, step: int) -> dict[str, Any]:
    """Return the metrics of the last evaluation; do the one that a stopped run left out. All ranks call."""
    known = run.checkpoint.manifest.get("metrics") if run.checkpoint else None
    known = known or {}
    left_out = run.checkpoint and step and due(step, run.config.train.eval_every) and step < run.config.train.steps
    if not left_out or known.get("step") == step:
        return known
    return evaluate(run, step, run.config.train.eval_tokens)


def do_step(run: Run, step: int, row: int, batches: Batches, learning_rate: float, reports: Reports) -> StepResult:
    """Do step number ``step`` (from 0) on the batch that begins at ``row``, and have it reported. All ranks call."""
    reports.begin()
    began = time.perf_counter()
    own = batches.take(row, run.config.train.steps - step - 1)
    data_seconds = time.perf_counter() - began
    result = run.trainable.train_step(own, learning_rate, step, run.guard.limit)
    result.data_seconds = data_seconds
    reports.add(step + 1, row, learning_rate, result)
    return result


def due(done: int, every: int) -> bool:
    """Return whether something that happens every ``every`` steps (0: never) happens after ``done``."""
    return every > 0 and done % every == 0


def evaluate(run: Run, step: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Return the task's metrics on the validation split, which data and context ranks divide. All ranks call.

    With ``step``, report them, and include it in them. ``limit``: the targets that are evaluated, about; None: all.
    With ``train.ema``, those of the moving average of the weights follow, as ``ema_NAME``.
    """
    metrics, trainable = _metrics(run, limit), run.trainable
    if run.config.train.ema is not None and isinstance(trainable, HasMovingAverage):
        trainable.show_average(True)
        metrics |= {f"ema_{name}": value for name, value in _metrics(run, limit).items()}
        trainable.show_average(False)
    if step is None:
        return metrics
    run.manager.hook.hvdlm_evaluated(step=step, metrics=metrics)
    return {"step": step, **metrics}


def _metrics(run: Run, limit: int | None) -> dict[str, float]:
    """Return the task's metrics of the weights that the model computes with now."""
    coordinates = run.mesh.coordinates(run.world.rank)
    # Of the ranks that hold one copy of the model, one of the last stage knows the losses (of its positions).
    counts = coordinates["tensor"] == 0 and coordinates["pipeline"] == run.mesh.pipeline - 1
    # Exact sums have as many shards on any number of ranks, and are added in the order of the shards.
    leaves = run.config.train.batch_size // (run.config.train.micro_batch_size or 1)
    size = leaves if run.config.communication.reduction == "exact" else run.mesh.data
    own = size // run.mesh.data
    limited = {} if limit is None else {"limit": limit}
    sums: list[Counter[str]] = [Counter() for _ in range(own)]
    for shard, totals in enumerate(sums, coordinates["data"] * own):
        batches = run.task.validation(shard, size, **limited)
        if run.exchange.traits.shards_parameters:
            pairs = in_lockstep(run.world, batches, run.config.data.context)
        else:
            pairs = ((batch, True) for batch in batches)
        for batch, of_split in pairs:
            sums_of_batch = sums_of(run.task, run.trainable, batch)
            totals.update(sums_of_batch if of_split else {})
            process.alive()
    return run.task.metrics(over_ranks(run.world, sums if counts else []))


def sums_of(task: Task, trainable: Trainable, batch: Batch) -> dict[str, float]:
    """Return the sums of one validation batch that ``Task.metrics`` needs."""
    if isinstance(trainable, CountsCorrect):
        loss, tokens, correct = trainable.eval_figures(batch)
        figures = {"loss": loss, "tokens": tokens, "predicted": correct}
    else:
        loss, tokens = trainable.eval_step(batch)
        figures = {"loss": loss, "tokens": tokens}
    prefix = f"{batch.corpus}/" if batch.corpus else ""
    return {**{f"{prefix}{name}": value for name, value in figures.items()}, **task.count(trainable, batch)}


def over_ranks(world: World, sums: Sequence[Mapping[str, float]]) -> Counter[str]:
    """Return the totals of all ranks' ``sums``, added in their order. All ranks call."""
    totals: Counter[str] = Counter()
    for shard in (shard for shards in world.gather_objects(list(map(dict, sums))) for shard in shards):
        totals.update(shard)
    return totals


def save(run: Run, done: int, metrics: dict[str, Any]) -> int:
    """Start to write the checkpoint of step ``done``; return ``done``. All ranks call."""
    began = time.perf_counter()
    run.check_folder()
    meta = {
        "config": replace(run.requested, train=replace(run.requested.train, steps=run.config.train.steps)).to_dict(),
        "tokenizer": run.task.tokenizer.hash,
        "vocab": run.config.model.vocab or run.task.vocab,
        "data": run.task.fingerprint,
        "mesh": run.mesh.shape,
        "versions": versions(run.config.framework),
        "device": run.resolved.device,
        "cursor": run.cursor.to_json(),
        "guard": run.guard.state(),
        "metrics": metrics,
        **({"base": run.base} if run.base else {}),
    }
    trainable, state = run.trainable, run.trainable.state()
    replicas = trainable.replicas(state) if run.config.train.replica_check_every else None
    report_saved(run, run.saver.start(done, state, meta, trainable.shards(), began, replicas, trainable.frozen))
    return done


def report_saved(run: Run, saved: list[Saved]) -> None:
    """Report checkpoints that are completely written."""
    for checkpoint in saved:
        run.manager.hook.hvdlm_checkpoint_saved(
            step=checkpoint.step,
            path=str(checkpoint.path),
            seconds=checkpoint.blocked_seconds,
            total_seconds=checkpoint.seconds,
        )
