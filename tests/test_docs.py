"""What the documents promise is there."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from hvdlm import hookspecs
from launching import environment, install, launch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "cluster" / "README.md",
]
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("hvdlm_"))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    function = getattr(hookspecs, hook)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert f"### `{hook}({', '.join(arguments)})" in (ROOT / "docs" / "plugins.md").read_text()


def module_of(name: str) -> str:
    """Return the module that a dotted name is in, or the name itself."""
    segments = name.split(".")
    for length in range(len(segments), 1, -1):
        with contextlib.suppress(ModuleNotFoundError):  # a name within a module has no parent package
            if importlib.util.find_spec(".".join(segments[:length])):
                return ".".join(segments[:length])
    return name


def test_the_reference_has_all_that_plugin_authors_are_told() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    groups = set(re.findall(r"^\| `(hvdlm\.\w+)` \|", text, re.M))  # of entry points
    named = (
        set(re.findall(r"\b(hvdlm(?:_\w+)?(?:\.\w+)+)", re.sub(r"\]\(.*?\)|```.*?```", "", text, flags=re.S))) - groups
    )
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {module_of(name) for name in re.findall(r"^::: (\S+)", pages, re.M)}
    missing = sorted(name for name in named if module_of(name) not in shown and f"::: {name}" not in pages)
    assert len(named) > 30 and not missing, missing


def test_the_reference_shows_what_is_called_like_a_function() -> None:
    (pattern,) = re.findall(r'filters: \["!(.*)"\]', (ROOT / "mkdocs.yml").read_text())
    assert re.search(pattern, "_private") and re.search(pattern, "__init__") and not re.search(pattern, "__call__")


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


def test_the_readme_s_plugin_works_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    import pluggy

    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    module = SimpleNamespace()
    exec(code, module.__dict__)
    manager = pluggy.PluginManager("hvdlm")
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.hook.hvdlm_run_started(config=None, world=SimpleNamespace(rank=0), info={}, run=None)
    for step, loss in enumerate([2.0, 2.0, 9.0], 1):
        result = SimpleNamespace(loss=loss)
        manager.hook.hvdlm_step_ended(step=step, result=result, learning_rate=0.1, seconds=1.0, rates=None)
    assert capsys.readouterr().out == "step 3: loss 9.000 is far above its mean 2.000\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the worked plugin of docs/plugins.md has been installed, with its options."""
    text = (ROOT / "docs" / "plugins.md").read_text()
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    code_blocks = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "running mean" in code]
    (source / "loss_spike.py").write_text("\n".join(code_blocks))
    return install(source, target)


def test_the_worked_plugin_installs_and_runs_with_its_options(installed: Path, tmp_path: Path) -> None:
    listed = launch("", 1, ["-m", "hvdlm", "plugins"], PYTHONPATH=str(installed))
    assert re.search(
        r"loss_spike +loss-spike 0.1 +loss_spike +options \(spikes\), run_started, step_ended", listed.stdout
    )
    command = ["-m", "hvdlm", "--plugins", "[loss_spike]"]
    helped = launch("", 1, [*command, "--help", "spikes"], PYTHONPATH=str(installed))
    assert "--spikes.factor" in helped.stdout and "how far above its running mean" in helped.stdout
    wrong = launch("", 1, [*command, "--spikes.factor", "high"], PYTHONPATH=str(installed))
    assert wrong.returncode == 2 and "--spikes.factor: got 'high', expected a number" in wrong.stderr
    small = ["--model.layers", "1", "--model.width", "8", "--model.heads", "1", "--train.steps", "3"]
    small += ["--train.batch_size", "2", "--log.run", str(tmp_path / "run"), "--spikes.factor", "2.5"]
    done = launch("", 1, [*command, *small], PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "spikes:\n  factor: 2.5" in (tmp_path / "run" / "config.yaml").read_text()


SMALL_DEMO = "--train.steps 300 --train.warmup 20 --train.learning_rate 1e-2 --model.layers 2 --model.width 64 "
SMALL_DEMO += "--data.context 32 --train.batch_size 32 --data.validation_share 0.02"
ITS_OWN_MODEL = pytest.mark.full(covered_by="the case of a smaller model, which is as good after a sixth of the time")


@pytest.mark.parametrize(
    "options", [SMALL_DEMO, pytest.param("--train.steps 300", marks=ITS_OWN_MODEL)], ids=["small", "its-own"]
)
def test_make_demo_ends_with_the_perplexity_and_text(options: str) -> None:
    command = ["make", "demo", f"OPTIONS={options}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith("done: validation perplexity ")]
    assert ends and float(lines[ends[0]].split()[3]) < 6, lines[-20:]
    assert lines[ends[0] + 1].startswith("The ") and len("\n".join(lines[ends[0] + 1 :])) > 250
    assert "<stdout>" not in done.stdout


def test_the_licence_is_whole() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
