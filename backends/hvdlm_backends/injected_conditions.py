"""The YAML file of conditions that are injected into a world of threads, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from hvdlm.errors import HvdlmError
from hvdlm.io import safe_yaml, untrusted_input

_MOST_BYTES = 1 << 20
_MOST = 2**31
_BANDWIDTHS = {"bit/s": 0.125, "B/s": 1.0}
_LATENCIES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_QUANTITY = re.compile(r"(\d{1,12}(?:\.\d{1,12})?(?:e-?\d{1,2})?) ?([A-Za-z/]{1,6})")
Kind = Literal["error", "exit", "hang"]
Between = Literal["all", "within_nodes", "across_nodes"]


@dataclass(frozen=True)
class LinkRule:
    """Latency and bandwidth of the links that ``between`` names, from one step to another (both included).

    Attributes:
        between: ``all`` links, those ``within_nodes`` or ``across_nodes``, or those between any two of these ranks.
        latency: of a message (s); None: as of the rules before.
        bandwidth: in each direction (bytes/s); None: as of the rules before.
        from_step: its first step; 0: from the start, before the first step.
        to_step: its last step; None: the run's.
    """

    between: Between | tuple[int, ...]
    latency: float | None = None
    bandwidth: float | None = None
    from_step: int = 0
    to_step: int | None = None


@dataclass(frozen=True)
class SlowRanks:
    """Ranks that compute ``factor`` times as long, and ``seconds`` more in every step from one step to another."""

    ranks: tuple[int, ...]
    factor: float = 1.0
    seconds: float = 0.0
    from_step: int = 0
    to_step: int | None = None


@dataclass(frozen=True)
class Late:
    """A rank that comes ``seconds`` late to one collective: the ``collective``-th that it starts in ``step``."""

    rank: int
    step: int
    seconds: float
    collective: int = 1


@dataclass(frozen=True)
class Fault:
    """A rank that raises an error, ends without a word or hangs when ``step`` begins."""

    rank: int
    step: int
    kind: Kind = "error"


@dataclass(frozen=True)
class Conditions:
    """All conditions of a file; ``ranks_per_node``: ranks 0 to ranks_per_node - 1 are on the first node, and so on."""

    ranks_per_node: int | None = None
    links: tuple[LinkRule, ...] = ()
    slow: tuple[SlowRanks, ...] = ()
    late: tuple[Late, ...] = ()
    faults: tuple[Fault, ...] = ()


_ENTRIES = {"links": LinkRule, "slow": SlowRanks, "late": Late, "faults": Fault}


def applies(rule: LinkRule | SlowRanks, step: int) -> bool:
    """Return whether ``rule`` applies in ``step``."""
    return rule.from_step <= step and (rule.to_step is None or step <= rule.to_step)


def read_conditions(path: Path, size: int) -> Conditions:
    """Return the conditions in the YAML file ``path``, for a world of ``size`` ranks.

    Raises:
        HvdlmError: the first problem of the file.
    """
    import yaml

    try:
        content = safe_yaml.load(untrusted_input.read(path, _MOST_BYTES).decode(), yaml.safe_load)
        return _Reader(size).conditions(content)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise HvdlmError(f"injected.file {path}: {reason}.") from error


class _Reader:
    """Checks a file's content; raises ValueError: what is wrong, where, and what was expected."""

    def __init__(self, size: int) -> None:
        self._size = size

    def conditions(self, content: Any) -> Conditions:
        values = self._known(content, Conditions, "")
        if "ranks_per_node" in values:
            values["ranks_per_node"] = self._whole(values["ranks_per_node"], "ranks_per_node", 1, _MOST)
        for name, kind in _ENTRIES.items():
            entries = self._list(values.get(name, []), name)
            values[name] = tuple(self._entry(entry, kind, f"{name}[{i}]") for i, entry in enumerate(entries))
        for i, rule in enumerate(values["links"]):
            if rule.between in ("within_nodes", "across_nodes") and values.get("ranks_per_node") is None:
                raise ValueError(f"links[{i}].between is {rule.between}, which needs ranks_per_node")
        return Conditions(**values)

    def _entry(self, entry: Any, kind: type[Any], where: str) -> Any:
        values = self._known(entry, kind, where)
        fields = dataclasses.fields(kind)
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
        if missing:
            raise ValueError(f"{where} has no {missing[0]}")
        made = kind(**{name: getattr(self, f"_{name}")(value, f"{where}.{name}") for name, value in values.items()})
        if isinstance(made, LinkRule) and made.latency is None and made.bandwidth is None:
            raise ValueError(f"{where} has neither latency nor bandwidth")
        last = getattr(made, "to_step", None)
        if last is not None and last < made.from_step:
            raise ValueError(f"{where}.to_step is {last}, expected {made.from_step} (from_step) or more")
        return made

    def _known(self, value: Any, kind: type[Any], where: str) -> dict[str, Any]:
        """Return a mapping whose keys are fields of ``kind``."""
        names = [field.name for field in dataclasses.fields(kind)]
        if not isinstance(value, Mapping):
            _refuse(value, where or "the file", f"a mapping with {', '.join(names)}")
        for key in value:
            if key not in names:
                close = difflib.get_close_matches(key, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(names)}"
                raise ValueError(f"{where or 'the file'} has no field {untrusted_input.shown(key)}; {hint}")
        return dict(value)

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            _refuse(value, where, "a list")
        return value

    def _whole(self, value: Any, where: str, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            _refuse(value, where, f"a whole number from {low} to {high}")
        return int(value)

    def _number(self, value: Any, where: str, low: float) -> float:
        if type(value) not in (int, float) or not low <= value < math.inf:
            _refuse(value, where, f"a number, {low:g} or more")
        return float(value)

    def _quantity(self, value: Any, where: str, units: Mapping[str, float], example: str) -> float:
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        scale = units.get(match[2]) if match else None
        if match is None or scale is None or not (number := float(match[1]) * scale) < math.inf:
            _refuse(value, where, f"a number with a unit, such as {example}")
        return number

    def _rank(self, value: Any, where: str) -> int:
        return self._whole(value, where, 0, self._size - 1)

    def _ranks(self, value: Any, where: str) -> tuple[int, ...]:
        ranks = tuple(self._rank(rank, f"{where}[{i}]") for i, rank in enumerate(self._list(value, where)))
        if not ranks or len(set(ranks)) < len(ranks):
            _refuse(value, where, "ranks that differ")
        return ranks

    def _between(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            ranks = self._ranks(value, where)
            return ranks if len(ranks) > 1 else _refuse(value, where, "two ranks or more")
        if value not in get_args(Between):
            _refuse(value, where, f"{', '.join(get_args(Between))} or a list of ranks")
        return value

    def _latency(self, value: Any, where: str) -> float:
        return self._quantity(value, where, _LATENCIES, "50 us, 1 ms or 0.5 s")

    def _bandwidth(self, value: Any, where: str) -> float:
        units = {f"{prefix}{unit}": p * u for prefix, p in _PREFIXES.items() for unit, u in _BANDWIDTHS.items()}
        bandwidth = self._quantity(value, where, units, "10 Mbit/s or 1.25 GB/s")
        return bandwidth if bandwidth > 0 else _refuse(value, where, "more than 0")

    def _from_step(self, value: Any, where: str) -> int:
        return self._whole(value, where, 0, _MOST)

    def _step(self, value: Any, where: str) -> int:
        return self._whole(value, where, 1, _MOST)

    _to_step = _collective = _step

    def _factor(self, value: Any, where: str) -> float:
        return self._number(value, where, 1.0)

    def _seconds(self, value: Any, where: str) -> float:
        return self._number(value, where, 0.0)

    def _kind(self, value: Any, where: str) -> Any:
        return value if value in get_args(Kind) else _refuse(value, where, f"one of {', '.join(get_args(Kind))}")


def _refuse(value: Any, where: str, expected: str) -> NoReturn:
    got = untrusted_input.shown(repr(value) if isinstance(value, str) else value)
    raise ValueError(f"{where} is {got}, expected {expected}")
