"""The first sentences of a report: which run is better, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from hvdlm_report.figures import duration, loss_unit, rate, share, six_digits, whole
from hvdlm_report.runs import RunData

# The figures by which finished runs are compared: the first that all of them have.
_HIGHER = {"accuracy": "validation accuracy", "bleu": "BLEU"}
_LOWER = {"word_error_rate": "word error rate"}
_VOCABULARY = ("data.tokenizer", "data.vocab_size")  # losses per token depend on it
_EQUAL = 5e-4  # relative difference of losses below which no run is called better; seeds alone differ by more
_SPEED = 0.05  # relative difference of throughput from which on it is mentioned


def headline(runs: Sequence[RunData]) -> list[str]:
    """Return the result of a run, or which of several runs is better and by how much."""
    if len({run.task for run in runs}) > 1:
        return ["The runs have different tasks: their losses are not comparable."]
    result = _quality(runs) if len(runs) > 1 else None
    sentences = [result] if result else [_summary(run) for run in runs]
    return [*sentences, *(_speed(runs) if len(runs) > 1 else ())]


def _summary(run: RunData) -> str:
    name, values = "training loss", run.losses
    if run.curves.get("val_loss"):
        name, values = "validation loss", run.curves["val_loss"]
    if not values:
        return f"{run.name} has logged no loss yet."
    step, value = list(values.items())[-1]
    sentence = f"{run.name}: {name} {six_digits(value)} {loss_unit(run)} at step {whole(step)}"
    seconds = run.summary.get("seconds")
    return f"{sentence}, after {duration(seconds)} of training." if seconds else f"{sentence}."


def _quality(runs: Sequence[RunData]) -> str | None:
    for key, name in {**_HIGHER, **_LOWER}.items():
        if values := _final(runs, key):
            return _ranking(runs, values, name, "", "", key in _HIGHER)
    if len({tuple(run.config.get(key) for key in _VOCABULARY) for run in runs}) > 1:
        if values := _final(runs, "bits_per_byte"):
            return _ranking(runs, values, "validation loss", " bits per byte", "")
        return "The runs have different tokenizers: their losses per token are not comparable."
    for key, name in (("val_loss", "validation loss"), ("loss", "training loss")):
        common = set.intersection(*(set(run.curves.get(key, {})) for run in runs))
        if common:
            step = max(common)
            values = [run.curves[key][step] for run in runs]
            return _ranking(runs, values, name, f" {loss_unit(runs[0])}", f" at step {whole(step)}")
    return None


def _final(runs: Sequence[RunData], key: str) -> list[float]:
    """Return a figure of every run's end; [] unless all have it."""
    values = [float(math.nan if run.summary.get(key) is None else run.summary[key]) for run in runs]
    return values if all(map(math.isfinite, values)) else []


def _ranking(
    runs: Sequence[RunData], values: Sequence[float], name: str, unit: str, where: str, higher: bool = False
) -> str:
    """Return which of the runs has the best of ``values``, and how far the others are behind."""
    order = sorted(range(len(runs)), key=lambda number: -values[number] if higher else values[number])
    best, *others = order
    form = share if name in ("validation accuracy", "word error rate") else six_digits
    if abs(values[others[-1]] - values[best]) <= _EQUAL * abs(values[best]):
        ending = "" if len(runs) == 2 else " of one another"
        return f"The runs are equally good: {name}{where}, {form(values[best])}{unit}, within {share(_EQUAL)}{ending}."
    behind = [f"{form(values[other])} of {runs[other].name} ({_by(values[best], values[other])})" for other in others]
    word = "highest" if higher else "lowest"
    start = f"{runs[best].name} is the better run" if len(runs) == 2 else f"{runs[best].name} is the best run"
    return f"{start}: {word} {name}{where}, {form(values[best])}{unit}, against {' and '.join(behind)}."


def _by(best: float, other: float) -> str:
    if not other:
        return f"{abs(best - other):.3g} apart"
    return f"{share(abs(best - other) / abs(other))} {'higher' if best > other else 'lower'}"


def _speed(runs: Sequence[RunData]) -> Iterator[str]:
    rates: Mapping[int, float] = {
        number: float(value)
        for number, run in enumerate(runs)
        if isinstance(value := run.summary.get("tokens_per_second"), (int, float)) and 0 < value < math.inf
    }
    if len(rates) != len(runs):
        return
    fastest, slowest = max(rates, key=lambda n: rates[n]), min(rates, key=lambda n: rates[n])
    if rates[fastest] < (1 + _SPEED) * rates[slowest]:
        return
    word = "faster" if len(runs) == 2 else "fastest"
    times = rates[fastest] / rates[slowest]
    ranks = [runs[number].summary.get("world_size") or 1 for number in (fastest, slowest)]
    where = f", on {ranks[0]:,} against {ranks[1]:,} rank(s)" if ranks[0] != ranks[1] else ""
    yield (
        f"{runs[fastest].name} is the {word} run: {rate(rates[fastest])}, {times:.3g} times as many as "
        f"{runs[slowest].name}{where}."
    )
