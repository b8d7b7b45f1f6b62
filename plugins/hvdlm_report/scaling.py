"""A page about how simulated runs scale, from the files that ``plan --simulate --scaling`` writes; all is untrusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.terminal import printable
from hvdlm.io.value_checks import count, fields, list_of, mapping_of, number, text
from hvdlm_report import page
from hvdlm_report.chart import Chart, draw
from hvdlm_report.figures import rate, share
from hvdlm_report.runs import LARGEST, Curve

_BYTES = 2**18  # largest file that is read
_ROW = {
    "ranks": count(1),
    "tokens_per_second": number(0),
    "efficiency": number(0),
    "shares": mapping_of(number()),
}
_CONTENT = fields({"kind": text, "name": text, "rows": list_of(fields(_ROW), 1, 100)})


@dataclass(frozen=True)
class Scaling:
    """Figures by the number of ranks.

    Attributes:
        name: of the file, and what it is about.
        tokens_per_second, efficiency: curves over the ranks.
        shares: of the time that is lost, by cause: curves over the ranks.
    """

    name: str
    tokens_per_second: Curve
    efficiency: Curve
    shares: dict[str, Curve]


def read(path: Path) -> Scaling:
    """Return the content of a file.

    Raises:
        HvdlmError: it is missing, damaged, or another kind of file.
    """
    try:
        content = untrusted_input.read_json(path, _BYTES)
        _CONTENT(content, "")
        if content["kind"] != "scaling":
            raise ValueError("it is no file that plan --simulate --scaling has written")
        for row in content["rows"]:
            figures = (row["ranks"], row["tokens_per_second"], row["efficiency"], *row["shares"].values())
            if max(map(abs, figures)) > LARGEST:
                raise ValueError(f"a figure of {row['ranks']} ranks is above {LARGEST:g}")
    except (ValueError, OSError) as error:
        reason = untrusted_input.shown(str(error), 200)
        raise HvdlmError(f"{printable(str(path))}: the curves can't be read: {reason}.") from error
    return _scaling(printable(f"{path.name}: {content['name']}"), content["rows"])


def _scaling(name: str, rows: list[dict[str, Any]]) -> Scaling:
    rows = sorted(rows, key=lambda row: row["ranks"])
    causes = dict.fromkeys(printable(cause) for row in rows for cause in row["shares"])
    causes.pop("compute", None)
    return Scaling(
        name,
        {row["ranks"]: float(row["tokens_per_second"]) for row in rows},
        {row["ranks"]: float(row["efficiency"]) for row in rows},
        {c: {row["ranks"]: float(row["shares"][c]) for row in rows if c in row["shares"]} for c in causes},
    )


def write(paths: Sequence[Path], output: Path) -> list[str]:
    """Write the page about the files ``paths``; return its sentences.

    Raises:
        HvdlmError: a file can't be read, or the page can't be written.
    """
    scalings = [read(path) for path in paths]
    sentences = [sentence(scaling) for scaling in scalings]
    page.publish(output, _page(scalings, sentences))
    return sentences


def sentence(scaling: Scaling) -> str:
    """Return the efficiency at both ends, and what most is lost to."""
    efficiency = list(scaling.efficiency.items())
    (first, before), (last, after) = efficiency[0], efficiency[-1]
    start = f"{scaling.name}: efficiency {share(before)} on {first:,} ranks, {share(after)} on {last:,}"
    lost = {cause: curve[last] for cause, curve in scaling.shares.items() if curve.get(last)}
    if not lost:
        return f"{start}."
    cause = max(lost, key=lambda name: lost[name])
    return f"{start}, where most is lost to {cause}: {share(lost[cause])} of the time."


def _page(scalings: Sequence[Scaling], sentences: Sequence[str]) -> str:
    title = "hvdlm: simulated scaling"
    body = [f"<h1>{title}</h1>", page.legend(scalings)]
    body += [f'<p class="headline">{page.escape(line)}</p>' for line in sentences]
    body.append(f"<h2>Curves</h2>{page.choices(tokens=False, smooth=False)}")
    body.append(f'<div class="curves">{"".join(_charts(scalings))}</div>')
    ranks = sorted({number for scaling in scalings for number in scaling.efficiency})
    cells = [(f"{n:,} ranks", [_cell(scaling, n) for scaling in scalings]) for n in ranks]
    body.append(page.section("Throughput and efficiency", scalings, cells))
    return page.document(title, body)


def _charts(scalings: Sequence[Scaling]) -> Iterator[str]:
    yield _chart("Efficiency", "% of the time computing", [_percent(s.efficiency) for s in scalings], scalings)
    yield _chart("Throughput", "tokens per second", [s.tokens_per_second for s in scalings], scalings)
    each = [{ranks: value / ranks for ranks, value in s.tokens_per_second.items()} for s in scalings]
    yield _chart("Throughput of a rank", "tokens per second", each, scalings)
    for cause in dict.fromkeys(cause for scaling in scalings for cause in scaling.shares):
        curves = [_percent(scaling.shares.get(cause, {})) for scaling in scalings]
        if any(any(curve.values()) for curve in curves):
            yield _chart(f"Lost to {cause}", "% of the time", curves, scalings)


def _chart(title: str, unit: str, curves: Sequence[Curve], scalings: Sequence[Scaling]) -> str:
    named = [(scaling.name, curve) for scaling, curve in zip(scalings, curves, strict=True)]
    return draw(Chart(title, unit, over="ranks"), named)


def _percent(curve: Curve) -> Curve:
    return {ranks: 100 * value for ranks, value in curve.items()}


def _cell(scaling: Scaling, ranks: int) -> str:
    if ranks not in scaling.efficiency:
        return ""
    return f"{rate(scaling.tokens_per_second[ranks])}, {share(scaling.efficiency[ranks])}"
