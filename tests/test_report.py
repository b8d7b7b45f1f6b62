"""The HTML report of runs: complete, self-contained, and right about where two runs differ."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from hvdlm import cli
from hvdlm_report.axes import short, ticks
from hvdlm_report.chart import Chart, draw
from hvdlm_report.comparison import compare
from hvdlm_report.curves import thinned
from hvdlm_report.runs import read
from launching import BROWSER, STEPS


@pytest.fixture(scope="module")
def runs(curve: Callable[..., Path]) -> tuple[Path, Path]:
    """Return the runs of both frameworks on 2 ranks, with sampled text."""
    options = ("--log.sample_tokens", "40", "--train.eval_every", "10")
    return curve("torch", 2, *STEPS, *options), curve("tensorflow", 2, *STEPS, *options)


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "line", "circle", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_of_two_runs_shows_where_they_differ(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert cli.main(["report", *map(str, runs), "--output", str(output)]) == 0
    assert "Losses agree within 0.0001 on all 30 logged steps" in capsys.readouterr().out
    page = Page(output.read_text())
    assert not page.open and page.tags.count("figure") == 7 and page.tags.count("svg") == 7 * 4
    assert page.tags.count("script") == 1 and page.links == ["data:,"]  # self-contained
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"{summary['val_loss']:,.6g}" in page.text and str(run) in page.text
        assert (run / "sample.txt").read_text().strip() and (run / "sample.txt").read_text().strip() in page.text
        assert "numpy" in summary["versions"]
        assert all(version in page.text for version in summary["versions"].values())
    assert "gradients/all_reduce" in page.text and "train.seed" in page.text and "horovod" in page.text
    assert cli.main(["report", *map(str, runs), "--output", str(output), "--tolerance", "1e-12"]) == 0
    first, second = (read(run) for run in runs)
    at = next(step for step in sorted(first.losses) if abs(first.losses[step] - second.losses[step]) > 1e-12)
    assert f"first more than 1e-12 apart at step {at}: " in Page(output.read_text()).text


def test_an_unfinished_run_is_reported_and_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    run.mkdir()
    lines = [json.dumps({"step": s, "loss": 5.0 / s, "learning_rate": 1e-3, "note": "x"}) for s in range(1, 2000)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 7, "loss": NaN}', "[1]", '{"step": 20']))
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "<script>alert(1)</script>"}, "plugins": []}))
    (run / "sample.txt").write_text("</pre><img src=x onerror=alert(1)>")
    assert cli.main(["report", str(run), "--output", str(tmp_path / "p.html")]) == 0
    page = Page((tmp_path / "p.html").read_text())
    assert {"img", "b"} & set(page.tags) == set() and page.tags.count("script") == 1
    assert page.tags.count("figure") == 2 and page.tags.count("svg") == 4  # without an axis of tokens
    assert "<script>alert(1)</script>" in page.text and "<b>run" in page.text
    assert (tmp_path / "p.html").stat().st_size < 90_000


def test_folders_without_a_run_are_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "summary.json").write_text("{")
    for arguments, expected in (
        ([], "report: 0 runs are named, expected 1 to 4"),
        (["no"], "no: there is no run (no metrics.jsonl)"),
        ([str(tmp_path)], "a file of this run is damaged"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "summary.json").unlink()
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "no" / "p.html")]) == 2
    assert "name a file in a folder that can be written" in capsys.readouterr().err


def test_thinned_curves_keep_extremes_and_ticks_are_round() -> None:
    spiky = {step: 1.0 + (step == 7777) * 9.0 - (step == 4321) for step in range(10_000)}
    thin = thinned(spiky)
    assert len(thin) <= 402 and (max(thin.values()), min(thin.values())) == (10.0, 0.0) and 9999 in thin
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(1, 30) == [10, 20, 30] and ticks(2, 2) == [2]
    assert [short(v) for v in (0.05, 1234, 3.2e6, 5e9)] == ["0.05", "1.234k", "3.2M", "5G"]
    assert draw(Chart("t"), [("a", {})]) == "" and "polyline" in draw(Chart("t", "u"), [("a", {1: 1.0})])


def test_runs_without_a_common_step_are_reported(tmp_path: Path) -> None:
    runs = []
    for number, step in enumerate((1, 2)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}))
        runs.append(read(tmp_path / str(number)))
    assert compare(*runs, 1e-4).sentence() == "The runs have logged no step in common."


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is not looked at in a browser")
def test_a_browser_shows_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    output, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert cli.main(["report", *map(str, runs), "--output", str(output)]) == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1600"]
    shown = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*shown, f"--screenshot={picture}", output.as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 30_000
    assert dom(shown, output).count("<polyline") >= 14 * 4
    # The same page without its policy, and a pointer in the middle of the first chart.
    point = "const svg = document.querySelector('svg'), box = svg.getBoundingClientRect();"
    point += "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2}));"
    pointed = tmp_path / "pointed.html"
    text = output.read_text().replace("Content-Security-Policy", "x")
    pointed.write_text(text.replace("</body>", f"<script>{point}</script></body>"))
    first, second = (read(run).losses for run in runs)
    values = dom(shown, pointed).partition("<output>")[2].partition("</output>")[0]
    (step,) = {match[1] for match in re.finditer(r" at step (\d+)", values)}
    assert 10 < int(step) < 20
    assert all(f" {loss[int(step)]:.6g} at step {step}" in values for loss in (first, second))


def dom(browser: list[str], path: Path) -> str:
    """Return a page as a browser has changed it."""
    command = [*browser, "--dump-dom", path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()
