"""The results of the GPU kit: a file that is written after each case, and the tables made of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Case, Launch
from harness import Bar

ATTEMPTS = 2  # a case that failed is run once more, after all others


class Results:
    """Values by case, in ``FOLDER/results.json``; a second call with the folder continues after the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.json"
        stored = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self.machine: dict[str, Any] = stored.get("machine", {})
        self.cases: dict[str, dict[str, Any]] = stored.get("cases", {})

    def add(self, name: str, **values: Any) -> None:
        """Store the values of a case, or its ``error``, and write the file."""
        attempts = self.cases.get(name, {}).get("attempts", 0) + 1
        self.cases[name] = {**values, "attempts": attempts}
        self.write()

    def give_up(self, name: str, error: str) -> None:
        """Store the error of a case that is not tried again."""
        self.cases[name] = {"error": error, "attempts": ATTEMPTS}
        self.write()

    def write(self) -> None:
        """Write the file under a temporary name, then rename it: it is whole at any moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".partial")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"machine": self.machine, "cases": self.cases}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def values(self, name: str) -> dict[str, Any] | None:
        """Return the values of a case that succeeded."""
        case = self.cases.get(name)
        return None if case is None or "error" in case else case

    def pending(self, launches: Sequence[Launch]) -> list[tuple[Launch, tuple[Case, ...]]]:
        """Return the launches with the cases that are to be run: new ones in order, then those that failed before."""

        def filtered(wanted: Callable[[str], bool]) -> list[tuple[Launch, tuple[Case, ...]]]:
            chosen = ((launch, tuple(c for c in launch.cases if wanted(c.name))) for launch in launches)
            return [(launch, cases) for launch, cases in chosen if cases]

        def failed(name: str) -> bool:
            case = self.cases.get(name, {})
            return "error" in case and case["attempts"] < ATTEMPTS

        return filtered(lambda name: name not in self.cases) + filtered(failed)


def difference(results: Results, case: Case) -> float:
    """Return the largest difference of a case's losses and its reference's; nan where one of them is missing.

    A resumed run is compared from the step on from which it was resumed, to the end.
    """
    own, reference = results.values(case.name), results.values(case.reference)
    if own is None or reference is None:
        return math.nan
    first = own.get("first_step", 0)
    last = None if first else gpu_cases.COMPARED
    pairs = zip(own["losses"][:last], reference["losses"][first:last], strict=True)
    return max(abs(a - b) for a, b in pairs)


def tables(results: Results, launches: Sequence[Launch]) -> str:
    """Return the tables, in Markdown, of all cases that have been run."""
    texts = [machine(results), speed_table(results), check_table(results, launches), failures(results)]
    return "\n".join(text for text in texts if text)


def machine(results: Results) -> str:
    """Return the line that names device, versions and date."""
    facts = results.machine
    built = f" Horovod with NCCL was built in {facts['build_seconds']:.0f} s." if facts.get("build_seconds") else ""
    return f"{facts.get('device', '?')}, {facts.get('versions', '?')}, {facts.get('date', '?')}.{built}\n"


def speed_table(results: Results) -> str:
    """Return the table of the speed cases."""
    rows = []
    for case in gpu_cases.SPEED:
        if (v := results.values(case.name)) is None:
            continue
        spread = f"{v['ratio']:.3f} ({v['quartiles'][0]:.3f} to {v['quartiles'][1]:.3f})"
        mfu = "-" if v["mfu"] is None else f"{100 * v['mfu']:.1f}%"
        memory = [_gigabytes(v[name]) for name in ("hvdlm_memory", "plain_memory")]
        speeds = [f"{v[name]:,.0f}" for name in ("hvdlm_speed", "plain_speed")]
        rows.append([f"{case.rows}, {case.variant}", *speeds, spread, _bar(case.bar, v["ratio"]), mfu, *memory])
    if not rows:
        return ""
    head = ["batch", "hvdlm, tokens/s", "plain loop, tokens/s", "ratio (quartiles)", "bar", "MFU"]
    text = _markdown([*head, "hvdlm, GB", "plain loop, GB"], rows)
    return "\n".join([text, *_comparisons(results)]) + "\n"


def _comparisons(results: Results) -> list[str]:
    """Return sentences on default options beside the best variant, and on memory at batch 48."""
    lines = []
    for rows in sorted({case.rows for case in gpu_cases.SPEED}):
        variants = {c.variant: results.values(c.name) for c in gpu_cases.SPEED if c.rows == rows}
        default = variants.pop("default", None)
        shares = [_relative_speed(default, other) for other in variants.values() if default and other]
        if shares:
            text = f"Batch {rows}: default options / best: {min(shares):.3f}"
            lines.append(f"{text} (bar {_bar(gpu_cases.DEFAULT_BAR, min(shares))}).")
    value = results.values("speed: batch 48, compiled")
    if value and value["plain_memory"]:
        share = value["hvdlm_memory"] / value["plain_memory"]
        text = f"Batch 48, compiled: memory of hvdlm / of the plain loop: {share:.3f}"
        lines.append(f"{text} (bar {_bar(gpu_cases.MEMORY_BAR, share)}).")
    return ["", *lines] if lines else []


def _relative_speed(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the speed of hvdlm in one case divided by that in another.

    Where both ran beside the same plain loop, by their ratios to it, so that a slower clock of the GPU does not count.
    """
    name = "ratio" if one["plain"] == other["plain"] else "hvdlm_speed"
    return float(one[name] / other[name])


def check_table(results: Results, launches: Sequence[Launch]) -> str:
    """Return the table of the correctness matrix: largest differences of losses, by case and backend."""
    cases = [c for launch in launches for c in launch.cases if c.reference and c.name in results.cases]
    if not cases:
        return ""
    backends = list(dict.fromkeys(c.name.partition(": ")[0] for c in cases))
    cells: dict[str, dict[str, str]] = {}
    for case in cases:
        backend, _, name = case.name.partition(": ")
        cells.setdefault(name, {"bar": f"<= {case.tolerance:g}"})[backend] = _cell(results, case)
    rows = [[name, row["bar"], *(row.get(backend, "-") for backend in backends)] for name, row in cells.items()]
    return _markdown(["two ranks", "bar", *backends], rows) + "\n"


def _cell(results: Results, case: Case) -> str:
    if results.values(case.name) is None:
        return "failed"
    value = difference(results, case)
    if math.isnan(value):
        return "no reference"
    return f"{value:.1e}" + ("" if value <= case.tolerance else " (missed)")


def failures(results: Results) -> str:
    """Return a line for each case that failed."""
    lines = [f"- {name}: {case['error']}" for name, case in results.cases.items() if "error" in case]
    return "Failed:\n\n" + "\n".join(lines) + "\n" if lines else ""


def missed(results: Results, launches: Sequence[Launch]) -> list[str]:
    """Return the names of cases of the correctness matrix that failed or are beyond their tolerance."""
    cases = [c for launch in launches for c in launch.cases if c.reference and c.name in results.cases]
    return [c.name for c in cases if not difference(results, c) <= c.tolerance]


def _bar(bar: Bar | None, value: float) -> str:
    if bar is None:
        return "-"
    return f"{bar}{'' if bar.reached(value) else ' (missed)'}"


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
