"""The training loop, top to bottom: batch, step, tell, evaluate, save."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Mapping
from typing import Any

from hvdlm import checkpoint
from hvdlm.interfaces import Batch, RankError, StepResult
from hvdlm.run import Run, clear, versions
from hvdlm.schedule import make_schedule
from hvdlm.telemetry.interval import Interval
from hvdlm.topology import AXES


def train(run: Run) -> dict[str, Any]:
    """Train from the checkpoint, or from the start, to ``train.steps``; return the summary. All ranks call."""
    config, hook = run.config, run.manager.hook
    rate = make_schedule(config.train)
    started_at = run.checkpoint.step if run.checkpoint else 0
    _open_folder(run)
    hook.hvdlm_run_started(config=config, world=run.world, info=describe(run, started_at))
    meter = Meter(run.spec.parameters)
    watchdog = Watchdog(config.communication.timeout)
    metrics: dict[str, float] = {}
    evaluated = saved = None
    for step in range(started_at, config.train.steps):
        watchdog.rearm()
        began, busy = time.perf_counter(), run.world.transfer_seconds()
        result = run.trainable.train_step(micro_batches(run, step), rate(step), step)
        seconds = time.perf_counter() - began
        if busy is not None:
            result.transfer_seconds = run.world.transfer_seconds() - busy  # type: ignore[operator]
        meter.add(result, seconds)
        done = step + 1
        hook.hvdlm_step_ended(step=done, result=result, learning_rate=rate(step), seconds=seconds)
        if result.loss != result.loss:
            raise RankError(
                f"the loss of step {done} is not a number: lower --train.learning_rate or set --train.clip."
            )
        if due(done, config.train.eval_every):
            metrics, evaluated = evaluate(run), done
            hook.hvdlm_evaluated(step=done, metrics=metrics)
        if due(done, config.checkpoint.every):
            saved = save(run, done)
    if evaluated != config.train.steps:
        metrics = evaluate(run)
        hook.hvdlm_evaluated(step=config.train.steps, metrics=metrics)
    if saved != config.train.steps and started_at < config.train.steps:
        save(run, config.train.steps)
    watchdog.stop()
    summary = summarise(run, meter, metrics)
    hook.hvdlm_run_ended(summary=summary)
    return summary


def due(done: int, every: int) -> bool:
    """Return whether something that happens every ``every`` steps (0: never) happens after ``done``."""
    return every > 0 and done % every == 0


def micro_batches(run: Run, step: int) -> list[Batch]:
    """Return this rank's rows of the global batch of ``step``, cut into micro-batches."""
    first, last = run.rows
    batch = run.task.batch(step, first, last)
    size = run.config.train.micro_batch_size or last - first
    return [batch.rows(start, start + size) for start in range(0, last - first, size)]


def evaluate(run: Run) -> dict[str, float]:
    """Return the task's figures on the whole validation split, each data rank doing its share. All ranks call."""
    at = run.mesh.coordinates(run.world.rank)
    place, counts = at["data"], at["tensor"] == 0 and at["pipeline"] == run.mesh.pipeline - 1
    loss_sum = tokens = 0.0
    for batch in run.task.validation(place, run.mesh.data):
        part_loss, part_tokens = run.trainable.eval_step(batch)
        loss_sum, tokens = loss_sum + part_loss, tokens + part_tokens
    sums = run.world.gather_objects([loss_sum, tokens] if counts else [0.0, 0.0])
    return run.task.metrics(sum(s[0] for s in sums), sum(s[1] for s in sums))


def save(run: Run, done: int) -> int:
    """Write the checkpoint of step ``done``, delete those that are too many, tell; return ``done``. All ranks call."""
    began = time.perf_counter()
    folder = run.folder / "checkpoints"
    meta = {
        "config": run.asked.to_dict(),
        "tokenizer": run.task.tokenizer.hash,
        "vocab": run.task.vocab,
        "mesh": run.mesh.shape,
        "versions": versions(run.config.framework),
    }
    path = checkpoint.save(folder, done, run.trainable.state(), meta, run.world, run.trainable.pieces())
    if run.world.rank == 0:
        checkpoint.prune(folder, run.config.checkpoint.keep)
    seconds = time.perf_counter() - began
    run.manager.hook.hvdlm_checkpoint_saved(step=done, path=str(path), seconds=seconds)
    return done


def _open_folder(run: Run) -> None:
    """Write what describes the run; rank 0 only."""
    if run.world.rank == 0:
        import json

        import yaml

        if run.config.log.overwrite and not run.checkpoint:
            clear(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(yaml.safe_dump(run.asked.to_dict(), sort_keys=False), encoding="utf-8")
        (run.folder / "tokenizer.json").write_text(json.dumps(run.task.tokenizer.to_json()), encoding="utf-8")


def describe(run: Run, start_step: int) -> dict[str, Any]:
    """Return what ``hvdlm_run_started`` tells."""
    return {
        "parameters": run.spec.parameters,
        "flops_per_token": run.spec.flops_per_token,
        "vocab": run.task.vocab,
        "start_step": start_step,
        "steps": run.config.train.steps,
        "framework": run.config.framework,
        "backend": run.config.backend,
        "versions": versions(run.config.framework),
    }


class Meter:
    """Totals over the steps of this process. The first is left out of rates: frameworks build their graphs in it."""

    def __init__(self, parameters: int) -> None:
        self.bytes = self.steps = 0
        self.last_loss = self.seconds = self.idle = 0.0
        self.axis_bytes: dict[str, int] = {}
        self.rates = Interval(parameters)

    def add(self, result: StepResult, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.bytes += result.comm_bytes
        self.last_loss = result.loss
        self.axis_bytes = result.axis_bytes
        if self.steps > 1:
            self.seconds += seconds
            self.idle += result.idle_seconds
            self.rates.add(result, seconds)


class Watchdog:
    """Ends a rank that makes no step for ``timeout`` seconds, with the stack of every thread on standard error."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._armed = timeout, 0.0

    def rearm(self) -> None:
        """Start counting anew; costs nothing most of the time."""
        now = time.monotonic()
        if now - self._armed > self._timeout / 10:
            # Longer than Horovod's own stall limit, which names the ranks that are missing.
            faulthandler.dump_traceback_later(self._timeout * 1.5, exit=True, file=sys.__stderr__ or 2)
            self._armed = now

    def stop(self) -> None:
        """Stop counting."""
        faulthandler.cancel_dump_traceback_later()


def summarise(run: Run, meter: Meter, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return what ``summary.json`` holds. All ranks call.

    Peak memory is that of the rank with the most; ``ranks`` tells of every rank what it holds and what a step of it
    moved along every axis, each beside what closed forms predict; ``idle_share`` is the mean over ranks.
    """
    from hvdlm.telemetry.memory import peak_memory_bytes

    traffic = {key: [entry.calls, entry.bytes, entry.seconds] for key, entry in sorted(run.trainable.traffic().items())}
    predicted = run.manager.hook.hvdlm_predict(config=run.config, spec=run.spec, mesh=run.mesh, rank=run.world.rank)
    own: dict[str, Any] = {"memory": run.trainable.memory(), "step_bytes": meter.axis_bytes}
    if predicted:
        own |= {"predicted_memory": predicted.memory, "predicted_step_bytes": predicted.bytes}
    idle = meter.idle / meter.seconds if meter.seconds else 0.0
    everyone = run.world.gather_objects([meter.bytes, peak_memory_bytes(), traffic, own, idle])
    rates = meter.rates
    return {
        "train_loss": meter.last_loss,
        **metrics,
        "tokens_per_second": rates.tokens_per_second if rates.steps else 0.0,
        "seconds": meter.seconds,
        "steps": run.config.train.steps,
        "world_size": run.world.size,
        "mesh": dict(zip(AXES, run.mesh.shape, strict=True)),
        "framework": run.config.framework,
        "backend": run.config.backend,
        "parameters": run.spec.parameters,
        "bytes_communicated": sum(part[0] for part in everyone),
        "compression": rates.compression,
        "comm_share": rates.comm_share if rates.steps else 0.0,
        "overlap": rates.overlap,
        "idle_share": sum(part[4] for part in everyone) / len(everyone),
        "predicted_idle_share": predicted.idle_share if predicted else None,
        "traffic": _over_ranks([part[2] for part in everyone]),
        "peak_memory_bytes": max(part[1] for part in everyone),
        "ranks": [part[3] for part in everyone],
    }


def _over_ranks(parts: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the sums over ranks, by ``purpose/operation``."""
    names = sorted({key for part in parts for key in part})
    return {
        key: {
            name: sum(part[key][i] for part in parts if key in part)
            for i, name in enumerate(("calls", "bytes", "seconds"))
        }
        for key in names
    }
