"""The charts and the headline of the report: legible on a phone, with units, and right about which run is better."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvdlm_report import assets, page
from hvdlm_report.axes import Axis, axis_range, labels
from hvdlm_report.chart import FONT, HEIGHT, WIDTH, Chart, draw
from hvdlm_report.curves import smoothed
from hvdlm_report.headline import headline
from hvdlm_report.runs import RunData

STEPS = st.dictionaries(st.integers(0, 2**53), st.floats(-1e99, 1e99, allow_subnormal=False), min_size=1, max_size=60)


def figure(chart: Chart, *curves: dict[int, float], marks: tuple[int, ...] = ()) -> ElementTree.Element:
    return ElementTree.fromstring(draw(chart, [(f"r{n}", curve) for n, curve in enumerate(curves)], marks))


def tick_texts(svg: ElementTree.Element) -> tuple[list[str], list[str]]:
    """Return the labels of the vertical and of the horizontal axis, after a check that each lies within the drawing."""
    vertical, horizontal = [], []
    for text in svg.iter("text"):
        label, x, y = str(text.text), float(text.attrib["x"]), float(text.attrib["y"])
        width = 0.6 * FONT * len(label)
        left = x - (width if text.attrib["text-anchor"] == "end" else width / 2)
        assert left >= 0 and left + width <= WIDTH and 0.7 * FONT <= y <= HEIGHT
        (vertical if text.attrib["text-anchor"] == "end" else horizontal).append(label)
    return vertical, horizontal


def check_drawings(drawn: ElementTree.Element, count: int) -> None:
    svgs = list(drawn.iter("svg"))
    assert len(svgs) == count
    for svg in svgs:
        for texts in tick_texts(svg):
            assert texts and len(set(texts)) == len(texts)
        for line in svg.iter("polyline"):
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


@given(curves=st.lists(STEPS, min_size=1, max_size=4))
@example([{9007199253959751: 0.0, 9007199253957853: 0.0}])
@settings(max_examples=150, deadline=None)
def test_labels_of_ticks_differ_and_lie_within(curves: list[dict[int, float]]) -> None:
    tokens = [64 * (n + 1) for n in range(len(curves))]
    check_drawings(figure(Chart("t", "u", True, tokens), *curves, marks=(1,)), 4)


@pytest.mark.parametrize("low, high", [(2.1969, 2.1973), (0.99999, 1.00001), (1e6, 1e6 + 3), (0, 1e-9), (-5, 5)])
def test_labels_tell_close_ticks_apart(low: float, high: float) -> None:
    values = Axis(*axis_range([low, high]), 0, 1).ticks()
    texts = labels(values)
    assert len(set(texts)) == len(values) >= 3
    gap = values[1] - values[0]
    for text, value in zip(texts, values, strict=True):
        factor = {"k": 1e3, "M": 1e6}.get(text[-1], 1.0)
        assert abs(float(text.rstrip("kM")) * factor - value) < gap / 2


def test_labels_of_long_runs_do_not_overlap() -> None:
    drawn = figure(Chart("t"), dict.fromkeys(range(10000000, 10000020), 1.0))
    ends = []
    for text in next(drawn.iter("svg")).iter("text"):
        if text.attrib["text-anchor"] == "middle":
            half = 0.6 * FONT * len(str(text.text)) / 2
            ends.append((float(text.attrib["x"]) - half, float(text.attrib["x"]) + half))
    assert len(ends) > 1 and all(a[1] < b[0] for a, b in itertools.pairwise(ends))


def test_a_logarithmic_axis_places_powers_evenly() -> None:
    log = list(figure(Chart("t"), {1: 1000.0, 2: 10.0, 3: 0.1}).iter("svg"))[1]
    assert log.attrib["class"] == "steps log" and tick_texts(log)[0] == ["0.1", "1", "10", "100", "1k"]
    y = [float(point.split(",")[1]) for point in next(log.iter("polyline")).attrib["points"].split()]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    with_zero = list(figure(Chart("t"), {1: 0.0, 2: 1.0, 3: 10.0}).iter("svg"))[1]  # a logarithm of 0 isn't drawn
    assert len(next(with_zero.iter("polyline")).attrib["points"].split()) == 2


def test_an_axis_of_tokens_compares_batches_of_two_sizes() -> None:
    """Half as many steps of twice as many tokens end at the same point."""
    drawn = figure(Chart("t", tokens_per_step=[100, 200]), {1: 3.0, 10: 2.0}, {1: 3.0, 5: 2.0})
    steps, tokens = (list(drawn.iter("svg"))[n] for n in (0, 2))
    assert tokens.attrib["class"] == "tokens linear" and tick_texts(tokens)[1][-1] == "1k"
    ends = [[line.attrib["points"].split()[-1] for line in svg.iter("polyline")] for svg in (steps, tokens)]
    assert len(set(ends[0])) == 2 and len(set(ends[1])) == 1


def test_smoothing_keeps_constants_and_reduces_noise() -> None:
    assert smoothed(dict.fromkeys(range(100), 3.0)) == pytest.approx(dict.fromkeys(range(100), 3.0))
    noisy = smoothed({step: 1.0 + (-1) ** step for step in range(200)})
    assert all(abs(noisy[step] - 1) < 0.3 for step in range(50, 200)) and smoothed({1: 1.0}) == {}
    classes = [line.attrib["class"] for line in figure(Chart("t", smooth=True), dict(noisy)).iter("polyline")]
    assert classes[:2] == ["raw run0", "smooth run0"]


def test_charts_are_no_wider_than_a_phone() -> None:
    """All widths and minimum widths of the style sheet are shares, or at most 6.5 letters; names may be broken."""
    assert "minmax(min(100%, 380px), 1fr)" in assets.STYLE and "overflow-wrap: anywhere" in assets.STYLE
    sizes = re.findall(r"(?<!max-)(?:min-)?width: ([\d.]+)(px|em|rem)", assets.STYLE)
    assert sizes and all(unit == "em" and float(size) <= 6.5 for size, unit in sizes if unit != "px")


def test_a_mark_outside_of_a_curve_is_left_out() -> None:
    drawn = figure(Chart("t"), {300: 1.0, 600: 0.5}, marks=(1, 400))
    assert len([line for line in next(drawn.iter("svg")).iter("line") if line.attrib["class"] == "mark"]) == 1


# The headline and the figures


def run(name: str, val_loss: float | None = None, ended: int = 10, **summary: Any) -> RunData:
    config = summary.pop("config", {})
    curves = {"loss": {step: 3.0 / step for step in range(1, ended + 1)}}
    if val_loss is not None:
        curves["val_loss"] = {5: 2.5, ended: val_loss}
    return RunData(name, curves, summary, config)


@pytest.mark.parametrize(
    "runs, sentence",
    [
        (
            [run("a", 1.5), run("b", 2.0)],
            "a is the better run: lowest validation loss at step 10, 1.5 nats per token, ",
        ),
        ([run("a", 1.5), run("b", 2.0)], "against 2 of b (25% lower)."),
        ([run("a", 2.0), run("b", 1.0), run("c", 4.0)], "b is the best run: "),
        ([run("a", 2.0), run("b", 1.0), run("c", 4.0)], "against 2 of a (50% lower) and 4 of c (75% lower)."),
        ([run("a", 1.5), run("b", 1.5001)], "The runs are equally good: validation loss at step 10, 1.5 "),
        ([run("a", 1.5), run("b", 1.0, ended=20)], "The runs are equally good: validation loss at step 5, 2.5"),
        ([run("a"), run("b", ended=4)], "The runs are equally good: training loss at step 4, 0.75"),
        ([run("a", accuracy=0.9), run("b", accuracy=0.6)], "a is the better run: highest validation accuracy, 90%, "),
        ([run("a", word_error_rate=0.2), run("b", word_error_rate=0.1)], "b is the better run: lowest word error rate"),
        ([run("a", 1.5), run("b", 1.0, config={"data.tokenizer": "byte"})], "different tokenizers"),
        (
            [run("a", 1.5, bits_per_byte=2.0), run("b", 1.0, bits_per_byte=4.0, config={"data.tokenizer": "byte"})],
            "a is the better run: lowest validation loss, 2 bits per byte, against 4 of b (50% lower).",
        ),
        ([run("a", 1.5), run("b", 1.0, config={"task": "digits"})], "The runs have different tasks"),
        (
            [run("a", 1.5, tokens_per_second=1e3, world_size=1), run("b", 1.5, tokens_per_second=3e3, world_size=4)],
            "b is the faster run: 3,000 tokens/s, 3 times as many as a, on 4 against 1 rank(s).",
        ),
        (
            [run("a", 1.5, seconds=90.0)],
            "a: validation loss 1.5 nats per token at step 10, after 1:30 min of training.",
        ),
        ([RunData("a", {})], "a has logged no loss yet."),
    ],
)
def test_the_headline_names_the_better_run(runs: list[RunData], sentence: str) -> None:
    assert sentence in " ".join(headline(runs))


def write_run(folder: Path, world_size: int) -> Path:
    folder.mkdir()
    line = {"loss": 2.0, "tokens_per_second": 9e3, "comm_share": 0.1, "comm_bytes": 4e6 * (world_size > 1)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **line}) + "\n" for s in range(1, 30)))
    memory = {"parameters": 3_000_000, "gradients": 0, "optimizer": 6_000_000, "activations": 0}
    summary: dict[str, Any] = {"train_loss": 2.0, "world_size": world_size, "seconds": 4000.0, "comm_share": 0.1052}
    summary |= {"tokens_per_second": 9123.456, "peak_memory_bytes": 369229824, "bytes_communicated": 3883027200}
    summary |= {"compression": 46.7, "overlap": 0.25, "ranks": [{"memory": memory, "predicted_memory": memory}]}
    summary["traffic"] = {"gradients/all_reduce": {"calls": 1200, "bytes": 3883008000, "seconds": 15.36}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"batch_size": 8}, "data": {"context": 64}}))
    return folder


def test_figures_have_units(tmp_path: Path) -> None:
    page.write([write_run(tmp_path / "run", 2)], tmp_path / "page.html", 1e-4)
    text = (tmp_path / "page.html").read_text()
    cells = re.findall(r"<td>([^<]*)</td>", text)
    for expected in (
        "2 nats per token",
        "1:06:40 h",
        "9,120 tokens/s",
        "369 MB",
        "3.88 GB",
        "46.7 to 1",
        "10.5%",
        "25%",
    ):
        assert expected in cells
    assert "3.88 GB in 1,200 calls, 15.4 s waited" in cells and "6 MB (predicted 6 MB)" in cells
    assert not [cell for cell in cells if re.fullmatch(r"\d{5,}|\d+\.\d{4,}", cell)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_figures_between_ranks_are_hidden_on_one_rank(world_size: int, tmp_path: Path) -> None:
    page.write([write_run(tmp_path / "run", world_size)], tmp_path / "page.html", 1e-4)
    text = (tmp_path / "page.html").read_text()
    assert ("ommunicat" in text) == (world_size > 1) and ("Compression" in text) == (world_size > 1)


def test_one_run_named_twice_is_compared_with_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 1)
    sentences = page.write([folder, folder], tmp_path / "page.html", 1e-4)
    assert "equally good" in sentences[0] and (tmp_path / "page.html").read_text().count('class="raw run1"') > 0


def test_a_page_runs_no_script_but_its_own(tmp_path: Path) -> None:
    page.write([write_run(tmp_path / "run", 1)], tmp_path / "page.html", 1e-4)
    text = (tmp_path / "page.html").read_text()
    assert "default-src 'none'; script-src 'sha256-" in text and text.count("<script>") == 1
    assert "innerHTML" not in text and "http://" not in text and "https://" not in text
