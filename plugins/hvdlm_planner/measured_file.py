"""The hardware file of this machine: where it lies, and how new measurements are added to it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from hvdlm.config import Config
from hvdlm.io.machine import cores
from hvdlm.io.user_folders import user_cache
from hvdlm.planning.hardware import Hardware, Link, MeasuredCollective, Rates, read_hardware, write_hardware

ASSUMED = Link(50e-6, 1e9)  # of a link that was not measured: Ethernet with 10 Gbit/s


@dataclass(frozen=True)
class Measurement:
    """What one launch has measured.

    Attributes:
        link: node, or network where the ranks are on several nodes.
        notes: of the measurement, such as its errors, for the file.
    """

    rates: Rates
    collectives: Sequence[MeasuredCollective]
    ranks_per_node: int
    link: str
    save_bytes_per_second: float
    notes: Mapping[str, str]


def measured_path() -> Path:
    """Return the file of this machine, whether it exists or not: in the user's cache, or that of ``HVDLM_HARDWARE``."""
    named = os.environ.get("HVDLM_HARDWARE")
    return Path(named) if named else user_cache() / "hardware.yaml"


def measured(config: Config) -> Hardware | None:
    """Return this machine as it was measured; None where it was not, for this framework and precision."""
    path = measured_path()
    if not path.exists():
        return None
    hardware = read_hardware(path)
    precision = "fp32" if config.train.precision == "auto" else config.train.precision
    known = any((rates.framework, rates.precision) == (config.framework, precision) for rates in hardware.rates)
    return hardware if known else None


def add(measurement: Measurement, path: Path) -> Hardware:
    """Add ``measurement`` to the file, in place of older ones of the same kind; return what it holds then."""
    known = read_hardware(path) if path.exists() else None
    hardware = merged(known, measurement)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_hardware(hardware, path)
    return hardware


def merged(known: Hardware | None, new: Measurement) -> Hardware:
    """Return ``known`` with the rates and collectives of ``new``."""
    known = known or _empty(new)
    links = dict(known.links)
    collectives = (*(c for c in known.collectives if not _replaced(c, new)), *new.collectives)
    if new.collectives:
        links[new.link] = link_of([c for c in collectives if c.link == new.link])
    return replace(
        known,
        rates=(*(rates for rates in known.rates if _key(rates) != _key(new.rates)), new.rates),
        collectives=collectives,
        links=links,
        ranks_per_node=max(known.ranks_per_node, new.ranks_per_node),
        save_bytes_per_second=new.save_bytes_per_second,
        measured={**known.measured, **new.notes},
    )


def _empty(new: Measurement) -> Hardware:
    name = f"{os.uname().nodename}, {cores()} cores"
    text = "steps of small models and collectives on this machine, by plan --measure"
    links = {"node": ASSUMED, "network": ASSUMED}
    memory = float(psutil.virtual_memory().total)
    return Hardware(
        name=name,
        fitted_on=text,
        tested_on="benchmarks/planner.py",
        rates=(),
        links=links,
        cores_per_node=cores(),
        memory_bytes=memory,
    )


def _key(rates: Rates) -> tuple[str, str, int]:
    return rates.framework, rates.precision, rates.ranks


def _replaced(old: MeasuredCollective, new: Measurement) -> bool:
    def key(c: MeasuredCollective) -> tuple[str, str, int, str, int]:
        return c.framework, c.link, c.ranks, c.operation, c.ranks_per_node

    return key(old) in map(key, new.collectives)


def link_of(tables: Sequence[MeasuredCollective]) -> Link:
    """Return latency and bandwidth of the measured broadcasts of a pair, or of the smallest group.

    Of several, those among the fewest ranks of a node.
    """
    [table, *_] = sorted((t for t in tables if t.operation == "broadcast"), key=lambda t: (t.ranks, t.ranks_per_node))
    latency, longest = table.seconds[0], table.seconds[-1]
    moved = table.bytes[-1] - table.bytes[0]
    if not moved:  # there was time for the fewest bytes only
        return replace(ASSUMED, latency_seconds=latency)
    return Link(latency, moved / max(longest - latency, 1e-9))


def about(framework: str, ranks: int, spread: float, error: float) -> dict[str, str]:
    """Return the notes of a measurement, under a name that a new one of the same kind has, too."""
    try:
        versions = f"{framework} {version(framework if framework != 'tensorflow' else 'tensorflow-cpu')}"
    except PackageNotFoundError:
        versions = framework
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    text = f"{when} UTC, {versions}, load {os.getloadavg()[0]:.1f}, spread {spread:.3f}, error of the fit {error:.3f}"
    return {f"{framework}, {ranks} rank(s)": text}
