"""Shared by all benchmarks: options with a short form, workers on ranks, paired ratios, one line per figure and bar.

A benchmark compares two things by letting them take turns in one run, close in time, so that other work on the machine
slows both alike; its figure is the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm_backends.probes import unpinned

FOLDER = Path(__file__).resolve().parent
FRAMEWORKS = ["torch", "tensorflow"]
SKIPPED = 77  # exit code of a benchmark that this machine can't run, as Automake's tests have it

Rounds = list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """Limits that a figure has to keep."""

    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.at_least is None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_most is None else f"{self.at_least:g} to {self.at_most:g}"

    def reached(self, value: float) -> bool:
        """Return whether ``value`` is within the limits; nan is not."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Figure:
    """A figure as ``report`` prints it: all text but whether it reached its bar (None: it has no bar)."""

    title: str
    value: str
    bar: str
    reached: bool | None
    details: str


_FIGURE = re.compile(
    r"(?P<title>.+): (?P<value>\S+), (?:no bar|bar (?P<bar>.+?): (?P<verdict>reached|MISSED)) \((.*)\)"
)


def report(title: str, value: float, bar: Bar | None, details: str = "") -> bool:
    """Print a figure beside its bar and the load of the machine; return whether the bar is reached."""
    reached = bar is None or bar.reached(value)
    verdict = f"bar {bar}: {'reached' if reached else 'MISSED'}" if bar else "no bar"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{title}: {_number(value)}, {verdict} ({f'{details}; ' if details else ''}{load})", flush=True)
    return reached


def _number(value: float) -> str:
    """Return ``value`` with 4 digits or, from 1000 on, without decimals; without an exponent unless it is tiny."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def report_ratio(title: str, rounds: Rounds, bar: Bar | None, details: str = "") -> bool:
    """Report the median of the rounds' ratios first / second, with its spread and both medians."""
    ratios = sorted(first / second for first, second in rounds)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    first, second = (statistics.median(values) for values in zip(*rounds, strict=True))
    spread = (
        f"quartiles {low:.3f} to {high:.3f} of {len(ratios)} rounds; medians {_number(first)} and {_number(second)}"
    )
    return report(title, statistics.median(ratios), bar, "; ".join(filter(None, (spread, details))))


def figures(output: str) -> list[Figure]:
    """Return the figures that ``report`` has printed into ``output``."""
    matches = [match for line in output.splitlines() if (match := _FIGURE.fullmatch(line))]
    verdicts = {"reached": True, "MISSED": False, None: None}
    return [Figure(m["title"], m["value"], m["bar"] or "", verdicts[m["verdict"]], m[5]) for m in matches]


def make_parser(description: str | None, frameworks: bool = True) -> argparse.ArgumentParser:
    """Return a parser with ``--short`` and, with ``frameworks``, their names as arguments (default: both)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if frameworks:
        parser.add_argument("frameworks", nargs="*", default=FRAMEWORKS, type=_framework, help="default: both")
    parser.add_argument("--short", action="store_true", help="do the same with tiny sizes, in seconds")
    return parser


def _framework(name: str) -> str:
    if name not in FRAMEWORKS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(FRAMEWORKS)}")
    return name


def parse(
    parser: argparse.ArgumentParser, full: Mapping[str, Any], short: Mapping[str, Any], arguments: Any = None
) -> argparse.Namespace:
    """Parse the command line with an option for each entry of ``full``: its default, or that of ``short``.

    An entry that is a list becomes an option of one or more values.
    """
    for name, value in full.items():
        several = isinstance(value, list)
        kind, default = type(value[0] if several else value), short.get(name, value)
        text = f"default: {_words(value)}" + (f"; --short: {_words(default)}" if default != value else "")
        parser.add_argument(f"--{name}", type=kind, nargs="+" if several else None, help=text.replace("%", "%%"))
    options = parser.parse_args(arguments)
    for name, value in {**full, **short}.items() if options.short else full.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.short:
        print("short form: at its tiny sizes, ratios of times say little", flush=True)
    return options


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return ``values`` as options of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def command(script: str, ranks: int, *options: str) -> list[str]:
    """Return the command that runs a worker script on ``ranks`` ranks."""
    return python_command(ranks, [str(FOLDER / script), *options])


def python_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs ``python ARGUMENTS`` on ``ranks`` ranks."""
    python = [sys.executable, *arguments]
    launcher = [shutil.which("mpirun") or "mpirun", "--bind-to", "none", "--oversubscribe", "-np", str(ranks)]
    return [*launcher, *python] if ranks > 1 else python


def environment() -> dict[str, str]:
    """Return this environment without thread counts and waiting policies; root may start ranks."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return unpinned() | allowed | {"TF_CPP_MIN_LOG_LEVEL": "3"}


def run_worker(script: str, ranks: int, options: Sequence[str], timeout: float = 1800) -> dict[str, list[Any]]:
    """Run a worker script on ``ranks`` ranks; return what rank 0 printed with ``emit``: values by label.

    Raises:
        SystemExit: the worker failed; the message holds the end of its output.
    """
    worker = command(script, ranks, *options)
    done = subprocess.run(worker, env=environment(), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        sys.exit(f"{script} failed with exit code {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return emitted(done.stdout)


def emitted(output: str) -> dict[str, list[Any]]:
    """Return the values that a worker has printed into ``output`` with ``emit``, by label."""
    values: dict[str, list[Any]] = {}
    for line in output.splitlines():
        if line.startswith(EMITTED):
            label, _, text = line.removeprefix(EMITTED).partition(" ")
            values.setdefault(label, []).append(json.loads(text))
    return values


EMITTED = "@"  # what the libraries of a worker print must not be taken for its values


def emit(label: str, value: Any) -> None:
    """Print a value for the benchmark that runs this worker."""
    print(f"{EMITTED}{label} {json.dumps(value)}", flush=True)


def check_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """End with a sentence where an option has values that aren't known."""
    if unknown := set(given) - set(known):
        sys.exit(f"{option}: {', '.join(sorted(unknown))} unknown; known: {', '.join(known)}")


def skip(reason: str) -> int:
    """Say why this machine can't run the benchmark; return the exit code."""
    print(f"skipped: {reason}", file=sys.stderr, flush=True)
    return SKIPPED
