"""Generate the documentation site's tables of options, help texts, and pages for files outside of docs/.

MkDocs calls these functions (``hooks`` in mkdocs.yml). Links from docs/ to other files of the repository are
redirected to pages below source/ on the site.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sbatch": "bash", ".sh": "bash", ".cfg": "ini"}
_LINK = re.compile(r"(\]\()(?![a-z]+:)([^)#\s]+)((?:#[^)]*)?\))")


def on_config(config: Any) -> Any:
    """Expand the glob patterns of the navigation; MkDocs warns about patterns that match no page."""
    config.nav = _expand(config.nav)
    return config


def _expand(nav: list[Any]) -> list[Any]:
    pages: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            pages += [{title: _expand(children)} for title, children in entry.items()]
        else:
            pages += sorted(str(path.relative_to(DOCS)) for path in DOCS.glob(entry)) or [entry]
    return pages


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file and folder outside of docs/ that a page links to."""
    queue = [DOCS / file.src_uri for file in files if file.is_documentation_page()]
    seen: set[Path] = set()
    while queue:
        page = queue.pop()
        for target in _link_targets(page):
            if target not in seen and DOCS not in target.parents:
                seen.add(target)
                queue += [target] if target.suffix == ".md" else []
                files.append(File.generated(config, _page_path(target), content=_page_content(target)))
    return files


def _link_targets(page: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository to which a Markdown file links."""
    for _, link, _ in _LINK.findall(page.read_text()):
        target = (page.parent / link).resolve()
        if target.exists() and ROOT in target.parents:
            yield target


def _page_path(target: Path) -> str:
    """Return the path, relative to docs/, of the page that shows a file or folder of the repository."""
    if DOCS in target.parents:
        target = min(target.glob("*.md")) if target.is_dir() else target
        return target.relative_to(DOCS).as_posix()
    name = f"source/{target.relative_to(ROOT).as_posix()}"
    if target.is_dir():
        return f"{name}/index.md"
    return name if target.suffix == ".md" else f"{name}.md"


def _page_content(target: Path) -> str:
    """Return the Markdown of the page that shows a file, or all source files of a folder."""
    if target.suffix == ".md":
        return target.read_text()
    paths = [
        p for p in sorted(target.rglob("*")) if p.suffix in LANGUAGES and "build" not in p.relative_to(target).parts
    ]
    paths = paths or [target]
    blocks = [f"`{p.relative_to(ROOT)}`\n\n~~~~~~{LANGUAGES.get(p.suffix, '')}\n{p.read_text()}~~~~~~\n" for p in paths]
    return "\n".join([f"# {target.relative_to(ROOT)}\n", *blocks])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Insert the generated sections, and redirect links that point outside of docs/."""
    for placeholder, generate in GENERATORS.items():
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, generate())
    uri = page.file.src_uri
    origin = ROOT / uri.removeprefix("source/") if uri.startswith("source/") else DOCS / uri
    if not origin.is_file():
        return markdown

    def redirect(match: re.Match[str]) -> str:
        target = (origin.parent / match[2]).resolve()
        if not target.exists() or (DOCS in target.parents and DOCS in origin.parents):
            return match[0]
        return match[1] + posixpath.relpath(_page_path(target), posixpath.dirname(uri) or ".") + match[3]

    return _LINK.sub(redirect, markdown)


def options() -> str:
    """Return a table of options for every section of the configuration."""
    from hvdlm.config import Config

    return "\n".join(_section("", Config))


def _section(name: str, kind: type) -> Iterator[str]:
    docstring = docstring_parser.parse(kind.__doc__ or "")
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in docstring.params}
    hints = get_type_hints(kind)
    leaves = [f for f in fields(kind) if not is_dataclass(hints[f.name]) and f.name != "plugin_options"]
    yield f"## {name or 'General'}\n\n{docstring.short_description}\n"
    yield "| Option | Type | Default | Description |\n|---|---|---|---|"
    for field in leaves:
        key = f"{name}.{field.name}" if name else field.name
        cells = [f"`--{key}`", _expected_type(hints[field.name]), f"`{_default(field)}`", helps[field.name]]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _section(f"{name}.{field.name}" if name else field.name, hints[field.name])


def _expected_type(hint: Any) -> str:
    from hvdlm.configuration.schema import expectation

    return expectation(hint).removeprefix("one of ")


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, str):
        return json.dumps(value)[1:-1]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def commands() -> str:
    """Return the ``--help`` text of every command; the options of ``train`` are on the configuration page."""
    from hvdlm.cli import COMMANDS, describe_added_commands

    sections = []
    for name, summary in (COMMANDS | describe_added_commands()).items():
        if name == "train":
            details = "Its options are those of the [configuration](configuration.md).\n"
        else:
            details = f"```text\n{_help(name)}\n```\n"
        sections.append(f"## {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{details}")
    return "\n".join(sections)


def _help(command: str) -> str:
    from hvdlm import cli

    os.environ["COLUMNS"] = "98"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return output.getvalue().strip()


def models() -> str:
    """Return mkdocstrings directives for the modules that describe models."""
    modules = []
    for package in ("hvdlm_language", "hvdlm_tasks.models"):
        for path in sorted((ROOT / "plugins" / package.replace(".", "/")).glob("*.py")):
            if re.search(r"^def (make_\w+|hvdlm_models)\(", path.read_text(), re.MULTILINE):
                modules.append(f"::: {package}.{path.stem}\n")
    return "\n".join(modules)


GENERATORS: dict[str, Callable[[], str]] = {
    "<!-- generated: options -->": options,
    "<!-- generated: commands -->": commands,
    "<!-- generated: models -->": models,
}

sys.path.insert(0, str(ROOT))
