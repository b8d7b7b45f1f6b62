"""What the documentation site has beside docs/: tables of options, help texts, and the files that pages point at.

MkDocs calls these functions (``hooks`` in mkdocs.yml). Links that lead out of docs/, which work in the repository, lead
to pages below source/ on the site.
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
    """Replace the patterns of the navigation by the pages that they match; MkDocs warns of what matches none."""
    config.nav = _expand(config.nav)
    return config


def _expand(nav: list[Any]) -> list[Any]:
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            found += [{title: _expand(part)} for title, part in entry.items()]
        else:
            found += sorted(str(path.relative_to(DOCS)) for path in DOCS.glob(entry)) or [entry]
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file and folder outside of docs/ that a page links to."""
    waiting = [DOCS / file.src_uri for file in files if file.is_documentation_page()]
    seen: set[Path] = set()
    while waiting:
        origin = waiting.pop()
        for target in _targets(origin):
            if target not in seen and DOCS not in target.parents:
                seen.add(target)
                waiting += [target] if target.suffix == ".md" else []
                files.append(File.generated(config, _page(target), content=_shown(target)))
    return files


def _targets(origin: Path) -> Iterator[Path]:
    """Yield what the links of a Markdown file lead to."""
    for _, link, _ in _LINK.findall(origin.read_text()):
        target = (origin.parent / link).resolve()
        if target.exists() and ROOT in target.parents:
            yield target


def _page(target: Path) -> str:
    """Return the page on which a file of the repository stands, as a path below docs/."""
    if DOCS in target.parents:
        target = min(target.glob("*.md")) if target.is_dir() else target
        return target.relative_to(DOCS).as_posix()
    name = f"source/{target.relative_to(ROOT).as_posix()}"
    return f"{name}/index.md" if target.is_dir() else name if target.suffix == ".md" else f"{name}.md"


def _shown(target: Path) -> str:
    if target.suffix == ".md":
        return target.read_text()
    paths = [
        p for p in sorted(target.rglob("*")) if p.suffix in LANGUAGES and "build" not in p.relative_to(target).parts
    ]
    paths = paths or [target]
    blocks = [f"`{p.relative_to(ROOT)}`\n\n~~~~~~{LANGUAGES.get(p.suffix, '')}\n{p.read_text()}~~~~~~\n" for p in paths]
    return "\n".join([f"# {target.relative_to(ROOT)}\n", *blocks])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what is generated, and turn links that lead out of docs/."""
    for mark, write in WRITERS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    uri = page.file.src_uri
    origin = ROOT / uri.removeprefix("source/") if uri.startswith("source/") else DOCS / uri
    if not origin.is_file():
        return markdown

    def turned(match: re.Match[str]) -> str:
        target = (origin.parent / match[2]).resolve()
        if not target.exists() or (DOCS in target.parents and DOCS in origin.parents):
            return match[0]
        return match[1] + posixpath.relpath(_page(target), posixpath.dirname(uri) or ".") + match[3]

    return _LINK.sub(turned, markdown)


def options() -> str:
    """Return a table of every section of the configuration."""
    from hvdlm.config import Config

    return "\n".join(_section("", Config))


def _section(name: str, kind: type) -> Iterator[str]:
    told = docstring_parser.parse(kind.__doc__ or "")
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in told.params}
    hints = get_type_hints(kind)
    plain = [f for f in fields(kind) if not is_dataclass(hints[f.name]) and f.name != "plugin_options"]
    yield f"## {name or 'The run'}\n\n{told.short_description}\n\n| Option | Takes | Default | |\n|---|---|---|---|"
    for field in plain:
        key = f"{name}.{field.name}" if name else field.name
        cells = [f"`--{key}`", _takes(hints[field.name]), f"`{_default(field)}`", helps[field.name]]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _section(f"{name}.{field.name}" if name else field.name, hints[field.name])


def _takes(hint: Any) -> str:
    from hvdlm.configuration.schema import expectation

    return expectation(hint).removeprefix("one of ")


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, str):
        return json.dumps(value)[1:-1]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def commands() -> str:
    """Return what every command's ``--help`` says; that of ``train`` is the configuration."""
    from hvdlm import plugins
    from hvdlm.cli import COMMANDS

    parts = []
    for name, what in (COMMANDS | plugins.describe_commands()).items():
        said = "" if name == "train" else f"```text\n{_help(name)}\n```\n"
        more = "Its options are those of the [configuration](configuration.md).\n" if name == "train" else ""
        parts.append(f"## {name}\n\n{what[0].upper()}{what[1:]}. {more}\n{said}")
    return "\n".join(parts)


def _help(command: str) -> str:
    from hvdlm import cli

    os.environ["COLUMNS"] = "98"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return said.getvalue().strip()


def models() -> str:
    """Return the directives for the modules of hvdlm/models that have presets."""
    folder = ROOT / "hvdlm" / "models"
    names = sorted(path.stem for path in folder.glob("*.py") if "\nPRESETS" in path.read_text())
    return "\n".join(f"::: hvdlm.models.{name}\n" for name in names)


WRITERS: dict[str, Callable[[], str]] = {
    "<!-- the site has the options here -->": options,
    "<!-- the site has the commands here -->": commands,
    "<!-- the site has the models here -->": models,
}

sys.path.insert(0, str(ROOT))
