"""The text of ``plan --simulate``: where the time goes and why, how often to save, how the run scales."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, safe_files
from hvdlm.parallel.mesh import AXES
from hvdlm.planning.hardware import Hardware
from hvdlm_planner.planned_run import PlannedRun, plan_run
from hvdlm_planner.simulate import (
    CAUSES,
    SimulatedRun,
    best_steps,
    content,
    model_ranks,
    save_every,
    scale,
    simulate_run,
)
from hvdlm_planner.simulate_options import SimulateOptions, duration, read_options


def simulation(config: Config, hardware: Hardware | None, values: argparse.Namespace) -> str:
    """Return the result of a simulation with the options of plan; write the JSON file of ``--scaling``.

    Raises:
        HvdlmError: the first problem of the options, the configuration or the file.
    """
    if hardware is None:
        raise HvdlmError("--simulate needs a machine: name it by --hardware, for example --hardware h100.")
    options = read_options(values, config.train.seed)
    if options.scaling is not None:
        safe_files.check_output(options.scaling)
    run = plan_run(config, hardware)
    simulated = simulate_run(run, hardware, options)
    scaled = scale(run, hardware, options)
    lines = [*_header(run, simulated, hardware, options), "", *_causes(simulated), ""]
    lines += [*_saves(simulated, options), "", *_scaling(scaled, run)]
    if options.scaling is not None:
        name = f"{run.config.model.name} on {hardware.name}"
        _write(options, json.dumps(content(scaled, name), indent=1) + "\n")
        lines += ["", f"{options.scaling}: python -m hvdlm report {options.scaling} draws it"]
    return "\n".join(lines)


def _write(options: SimulateOptions, text: str) -> None:
    assert options.scaling is not None
    try:
        atomic_files.replace(options.scaling, text)
    except OSError as error:
        raise HvdlmError(f"--scaling {options.scaling}: {error.strerror}: name a file in a writable folder.") from error


def _header(run: PlannedRun, simulated: SimulatedRun, hardware: Hardware, options: SimulateOptions) -> Iterator[str]:
    mesh, d = run.mesh, options.disturbances
    shape = " x ".join(str(n) for n in mesh.shape)
    yield f"ranks     {mesh.size:,}: {shape} ({' x '.join(AXES)}), on {hardware.name}"
    yield (
        f"step      {simulated.step.step:.4g} s, the mean of {options.steps:,}; "
        f"{simulated.tokens / simulated.step.step:,.0f} tokens/s between failures"
    )
    deviation = hardware.speed_deviation if options.speed_deviation is None else options.speed_deviation
    slow = [
        (d.straggler_share, f"{100 * d.straggler_share:g}% of the ranks always slow"),
        (d.straggler_rate, f"every rank slow in {100 * d.straggler_rate:g}% of its steps"),
    ]
    words = [f"{text} (x {d.straggler_factor:g})" for share, text in slow if share]
    words += [f"speeds differ by {100 * deviation:g}%"] if deviation else []
    words += [f"{d.distribution} jitter of {100 * d.jitter:g}%"] if d.jitter else []
    yield f"disturbed {'; '.join(words) or 'by nothing (--stragglers, --jitter)'}; seed {d.seed}"
    failures = simulated.failures
    if math.isinf(failures.mtbf):
        yield "failures  none (--rank_mtbf, --node_mtbf)"
    else:
        yield (
            f"failures  one in {duration(failures.mtbf)} on all ranks; {duration(failures.restart)} until training "
            f"continues; a save pauses {duration(failures.save)}"
            + (f" and is complete {duration(failures.write)} later" if failures.write else "")
        )


def _causes(run: SimulatedRun) -> Iterator[str]:
    """Yield the time of the whole run by cause, with the reasons."""
    yield f"time of {run.steps:,} steps".ljust(24) + "time".rjust(12) + "share".rjust(9) + "   why"
    for cause in CAUSES:
        seconds = run.seconds[cause]
        if not seconds:
            continue
        yield f"  {cause}".ljust(24) + _time_and_share(seconds, run.total) + f"   {_reason(cause, run)}"
    yield "  total".ljust(24) + _time_and_share(run.total, run.total)
    if not run.efficiency:
        yield "  the run never ends: it fails before it has saved anything new; save more often"
        return
    lost = max((cause for cause in CAUSES if cause != "compute"), key=lambda cause: run.seconds[cause])
    yield (
        f"  efficiency {100 * run.efficiency:.1f}%, {run.token_rate:,.0f} tokens/s; most is lost to {lost}: "
        f"{100 * run.seconds[lost] / run.total:.1f}%"
    )


def _time_and_share(seconds: float, total: float) -> str:
    if math.isinf(seconds):
        return "no end".rjust(12) + "".rjust(9)
    share = f"{100 * seconds / total:.1f}%" if math.isfinite(total) else ""
    return duration(seconds).rjust(12) + share.rjust(9)


def _reason(cause: str, run: SimulatedRun) -> str:
    step = run.step
    quiet = step.step - step.seconds["jitter"] - step.seconds["stragglers"]
    ranks = f"{run.mesh.size:,} ranks"
    return {
        "compute": "passes and updates of an undisturbed rank of mean speed",
        "communication": "collectives and messages that computation doesn't hide",
        "bubble": f"{run.mesh.pipeline} pipeline stages wait in turn, {run.costs.micro_batches} micro-batch(es) a step",
        "data": "making batches",
        "stragglers": f"all wait for the slowest of {ranks}: a step is {step.seconds['stragglers'] / quiet:.1%} longer",
        "jitter": f"all wait for the unluckiest of {ranks} in a step: {step.seconds['jitter'] / quiet:.1%} longer",
        "saves": f"a pause of {duration(run.failures.save)} every {run.interval:,} steps",
        "lost work": f"computed again after {run.failed:,.1f} failures; a save every "
        f"{duration(run.interval * step.step)}",
        "restarts": f"{duration(run.failures.restart)} after each failure, and again where a restart fails",
    }[cause]


def _saves(run: SimulatedRun, options: SimulateOptions) -> Iterator[str]:
    """Yield the best interval of saves, and what others lose."""
    best = best_steps(run)
    if best is None:
        yield "saves     without failures, the fewer the better (--rank_mtbf, --node_mtbf)"
        return
    yield (
        f"saves     best every {best:,} steps ({duration(best * run.step.step)}) by Daly's formula (2006); "
        f"checkpoint.every is {run.interval:,}"
    )
    rows = {max(1, best // 2): "half", best: "best", min(run.steps, 2 * best): "twice", run.interval: "as configured"}
    for interval, name in sorted(rows.items()):
        other = save_every(run, interval, options.disturbances.seed)
        wasted = sum(other.seconds[cause] for cause in ("saves", "lost work", "restarts")) / other.total
        share = f"{100 * wasted:.2f}% of the time lost" if other.efficiency else "the run never ends"
        yield f"  every {interval:,} steps".ljust(24) + f"{share} to saves, lost work and restarts ({name})"


def _scaling(runs: Sequence[SimulatedRun], run: PlannedRun) -> Iterator[str]:
    """Yield the scaling as a table."""
    rows = run.config.train.batch_size // run.mesh.data
    yield (
        f"scaling   the data axis grows, with {rows:,} sequence(s) on each of its ranks (weak scaling), saves as often "
        "as is best"
    )
    if not runs:
        per_node, ranks = run.mesh.data_per_node, model_ranks(run.mesh)
        take = f"{per_node:,} copies of the model on a node take" if per_node > 1 else "a copy of the model takes"
        yield f"  none: {take} {per_node * ranks:,} ranks, more than 4,096 or no power of two"
        return
    head = ("ranks", "tokens/s", "efficiency", *(cause for cause in CAUSES if cause != "compute"))
    yield "".join(name.rjust(14) for name in head)
    for one in runs:
        shares = [f"{100 * one.seconds[cause] / one.total:.1f}%" if one.efficiency else "-" for cause in CAUSES[1:]]
        figures = (f"{one.mesh.size:,}", f"{one.token_rate:,.0f}", f"{100 * one.efficiency:.1f}%", *shares)
        yield "".join(figure.rjust(14) for figure in figures)
