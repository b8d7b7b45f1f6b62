"""The result of a search of layouts as text, and the best layout as YAML to start from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdlm.config import Config
from hvdlm.io.terminal import size
from hvdlm.parallel.mesh import AXES, Mesh
from hvdlm.planning.memory_fit import Fit
from hvdlm.planning.search import LOSSY, Layout, value_of
from hvdlm.planning.search_reasons import Gain, largest_difference
from hvdlm.planning.step_time import StepTime

_LEAST_GAIN = 1e-3  # share of a step's seconds below which an option is not worth a line
_COLUMNS = ("tokens/s", "seconds", "mesh", "zero", "micro-batch", "bucket", "memory", "compute", "comm.", "bubble", "")


def table(layouts: Sequence[Layout]) -> Iterator[str]:
    """Yield a line for each layout, the fastest first."""
    rows = [_COLUMNS, *(tuple(_row(layout)) for layout in layouts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for number, row in enumerate(rows):
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        yield f"{str(number) if number else '':>3}  {'  '.join(cells)}  {row[-1]}".rstrip()


def _row(layout: Layout) -> Iterator[str]:
    time, options = layout.time, layout.options
    yield f"{layout.tokens_per_second:,.0f}"
    yield f"{time.seconds:.4g}"
    yield shape(layout.mesh)
    yield str(options["parallel.zero"])
    yield str(options["train.micro_batch_size"] or layout.config.train.batch_size // layout.mesh.data)
    yield size(options["communication.bucket_bytes"])
    yield size(layout.fit.needed)
    yield from (_seconds(seconds, time) for seconds in (time.compute, time.communication, time.bubble))
    yield ", ".join(_switches(options))


def _seconds(seconds: float, time: StepTime) -> str:
    return f"{seconds:.3g}" if seconds > 1e-6 * time.seconds else "0"  # less is rounding


def _switches(options: Mapping[str, Any]) -> Iterator[str]:
    if options["parallel.sequence"]:
        yield "sequence"
    if options["train.activation_checkpointing"]:
        yield "recomputed"
    yield from (str(options[name]) for name in LOSSY if options[name] not in ("all_reduce", "none"))


def shape(mesh: Mesh) -> str:
    """Return the sizes of a mesh: 16 x 1 x 4."""
    return " x ".join(map(str, mesh.shape))


def reasons(best: Layout, gains: Sequence[Gain]) -> Iterator[str]:
    """Yield a line for each option of the best layout: what the fastest without it lacks."""
    for gain in gains:
        start = f"  {gain.option} {_value(gain.value)}: with {_value(gain.plain)}, "
        if gain.without is None:
            yield f"{start}nothing fits the memory"
            continue
        slower = gain.without.time.seconds / best.time.seconds - 1
        if slower < _LEAST_GAIN:
            continue
        cause, without, of_best = largest_difference(gain.without.time, best.time)
        where = "" if gain.without.mesh == best.mesh else f" ({shape(gain.without.mesh)})"
        yield (
            f"{start}a step takes {gain.without.time.seconds:.4g} s at best{where}, {slower:.1%} more: {cause} "
            f"{_seconds(without, best.time)} s instead of {_seconds(of_best, best.time)}"
        )


def ruled_out(large: Layout | None, smallest: Mapping[Mesh, Fit], best: Layout) -> Iterator[str]:
    """Yield what doesn't fit: the layout that would be faster, and the meshes of which no layout fits."""
    if large is not None:
        gain = best.time.seconds / large.time.seconds - 1
        settings = ", ".join([f"zero {large.options['parallel.zero']}", *_switches(large.options)])
        yield (
            f"  the fastest without a limit of memory, {shape(large.mesh)} with {settings}, would be {gain:.1%} "
            f"faster and needs {size(large.fit.needed)} of {size(large.fit.available)}"
        )
    without = [f"{shape(mesh)} ({size(fit.needed)})" for mesh, fit in smallest.items() if not fit.fits]
    if without:
        yield f"  too large in every layout, with what they need at least: {', '.join(without)}"


def changes(config: Config, best: Layout) -> dict[str, Any]:
    """Return the options of a layout that differ from the given configuration's, by their full names."""
    return {name: value for name, value in best.options.items() if value != value_of(config, name)}


def as_yaml(config: Config, best: Layout, headline: str) -> str:
    """Return the options that differ as YAML, nested by section, below comments on what they are."""
    nested: dict[str, Any] = {}
    for name, value in changes(config, best).items():
        section = nested
        *sections, last = name.split(".")
        for one in sections:
            section = section.setdefault(one, {})
        section[last] = value
    lines = [f"# {headline}", *_yaml_lines(nested, 0)]
    return "\n".join(lines) + "\n"


def _yaml_lines(section: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield f"{'  ' * depth}{name}:"
            yield from _yaml_lines(value, depth + 1)
        else:
            yield f"{'  ' * depth}{name}: {_value(value)}"


def headline(best: Layout, machine: str) -> str:
    """Return what the best layout is predicted to reach."""
    axes = " x ".join(AXES)
    return (
        f"{best.mesh.size} ranks as {shape(best.mesh)} ({axes}): {best.tokens_per_second:,.0f} tokens/s predicted, "
        f"{best.time.seconds:.4g} s a step, on {machine}"
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
