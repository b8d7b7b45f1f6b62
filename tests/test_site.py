"""The documentation site is built without warnings, complete, and readable offline."""

from __future__ import annotations

import importlib.util
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hvdlm import cli, hookspecs
from hvdlm.config import Config
from hvdlm.configuration import schema
from launching import BROWSER, ROOT, run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install 'hvdlm[docs]'"
)


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run what ``make docs`` runs."""
    return run_python(["-m", "mkdocs", "build", "--strict", "-d", str(folder), *options], NO_MKDOCS_2_WARNING="1")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """The loaded files, the targets of links and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "href"):
                self.loaded.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_the_site_has_a_page_for_every_document(site: Path) -> None:
    documents = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(documents) > 20
    for path in documents:
        assert (site / path.with_suffix(".html")).is_file(), path


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for path, page in pages(site).items():
        assert page.loaded and not [link for link in page.loaded if "//" in link], path
        for link in page.loaded:
            assert (path.parent / unquote(urlsplit(link).path)).exists(), f"{path}: {link}"
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        assert "url(http" not in path.read_text() and "@import" not in path.read_text(), path


def test_internal_links_have_targets(site: Path) -> None:
    internal = [
        (path, target.path)
        for path, page in pages(site).items()
        for target in map(urlsplit, page.links)
        if not target.scheme and target.path
    ]
    assert len(internal) > 100
    for path, target in internal:
        assert (path.parent / unquote(target)).exists(), f"{path}: {target}"


def test_the_reference_has_every_option_command_and_hook(site: Path) -> None:
    options = Page(site / "reference" / "configuration.html").text.split()
    known = set(schema.types_of({"": Config})) - {"plugin_options"}
    assert len(known) > 100 and [key for key in sorted(known) if f"--{key}" not in options] == []
    commands = Page(site / "reference" / "commands.html").text
    for name in {*cli.COMMANDS, *cli.added_commands()} - {"train"}:
        assert f"usage: python -m hvdlm {name}" in commands
    hooks = Page(site / "reference" / "hooks.html").text
    names = [name for name in vars(hookspecs) if name.startswith("hvdlm_")]
    assert len(names) > 10 and [name for name in names if name not in hooks] == []


def test_the_reference_has_the_equations_of_models(site: Path) -> None:
    text = Page(site / "reference" / "models.html").text
    assert "softmax(q k^T / sqrt(head) + mask) v" in text and "c = s(f) c + s(i) tanh(g)" in text


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[gone](gone.md)\n")
    own = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nplugins: []\nnav: [index.md]\n"
    own += "extra_css: []\ntheme: {name: mkdocs, features: []}\n"
    (tmp_path / "mkdocs.yml").write_text(own)
    done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1 and "'gone.md', but the target is not found" in done.stdout + done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the site is not looked at in a browser")
def test_search_works_in_a_browser_without_a_server(site: Path, tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"{(site / 'index.html').as_uri()}?q=compression"
    command = [str(BROWSER), *options, "--virtual-time-budget=20000", "--dump-dom", address]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "/compression.html?h=compression" in shown
