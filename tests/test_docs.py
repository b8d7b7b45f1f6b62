"""What the documents promise is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hvdlm import hookspecs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("hvdlm_"))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    function = getattr(hookspecs, hook)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert f"### `{hook}({', '.join(arguments)})" in (ROOT / "docs" / "plugins.md").read_text()


def test_no_document_names_a_hook_that_is_not_there() -> None:
    for path in DOCUMENTS:
        used = set(re.findall(r"def (hvdlm_\w+)|### `(hvdlm_\w+)\(", path.read_text()))
        assert {a or b for a, b in used} <= set(HOOKS), path


def test_readme_names_the_two_commands_and_they_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme and f"\n{target}:" in makefile


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_examples_are_python(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        ast.parse(code)


def test_the_readme_s_plugin_works_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    import pluggy

    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    module = SimpleNamespace()
    exec(code, module.__dict__)
    manager = pluggy.PluginManager("hvdlm")
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.hook.hvdlm_run_started(config=None, world=SimpleNamespace(rank=0), info={})
    for step, loss in enumerate([2.0, 2.0, 9.0], 1):
        result = SimpleNamespace(loss=loss)
        manager.hook.hvdlm_step_ended(step=step, result=result, learning_rate=0.1, seconds=1.0)
    assert capsys.readouterr().out == "step 3: loss 9.000 is far above its mean 2.000\n"


def test_the_licence_is_whole() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
