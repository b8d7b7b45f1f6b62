"""The import walls: which rooms may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRANSPORTS = {"torch", "tensorflow", "keras", "horovod", "mpi4py"}
PLUGINS = {path.name for folder in ("backends", "plugins") for path in (ROOT / folder).glob("hvdlm_*")}
# Modules of the core by floor, lowest first: a module imports only from its own floor and from those below. Of several
# entries that fit a module, the longest counts.
FLOORS = [
    ["hvdlm.errors", "hvdlm.io"],
    [
        "hvdlm",
        "hvdlm.config",
        "hvdlm.protocols",
        "hvdlm.hookspecs",
        "hvdlm.diagnostics",
        "hvdlm.models",
        "hvdlm.plugins",
    ],
    [
        "hvdlm.communication.traffic",
        "hvdlm.configuration.ranges",
        "hvdlm.configuration.schema",
        "hvdlm.training.loss_scale",
        "hvdlm.training.lr_schedule",
    ],
    ["hvdlm.parallel", "hvdlm.communication"],
    ["hvdlm.planning", "hvdlm.data", "hvdlm.telemetry", "hvdlm.checkpoints"],
    ["hvdlm.configuration"],
    ["hvdlm.training"],
    ["hvdlm.commands", "hvdlm.cli", "hvdlm.__main__"],
]
TOP = {
    "__init__.py", "__main__.py", "cli.py", "config.py", "errors.py", "hookspecs.py", "plugins.py", "py.typed",
    "checkpoints", "commands", "communication", "configuration", "data", "diagnostics", "io", "models", "parallel",
    "planning", "protocols", "telemetry", "training",
}  # fmt: skip


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module or object) of every import; those for type checkers alone are left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sources(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, folder
    return paths


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int | None:
    """Return the floor of a module of the core, None where it is on none."""
    fits = [(len(entry), number) for number, entries in enumerate(FLOORS) for entry in entries if within(module, entry)]
    return max(fits)[1] if fits else None


def within(module: str, entry: str) -> bool:
    return module == entry or (entry != "hvdlm" and module.startswith(f"{entry}."))


@pytest.mark.parametrize("path", sources("hvdlm"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_core_module_imports_nothing_above_its_floor(path: Path) -> None:
    own = floor(module_name(path))
    assert own is not None, f"{path} is on no floor: add it to FLOORS"
    for line, name in imports(path):
        assert name.split(".")[0] not in TRANSPORTS | PLUGINS, f"{path}:{line} imports {name}"
        other = floor(name) if name.startswith("hvdlm.") else None
        assert other is None or other <= own, f"{path}:{line}: floor {own} imports {name} of floor {other}"


def test_the_core_has_the_rooms_of_the_design() -> None:
    entries = {path.name for path in (ROOT / "hvdlm").iterdir() if path.name != "__pycache__"}
    assert entries == TOP


def test_every_module_of_the_core_is_on_a_floor() -> None:
    assert floor("hvdlm.training.run") == 6 and floor("hvdlm.training.loss_scale") == 2
    assert floor("hvdlm.unknown") is None and floor("hvdlm.ioless") is None


# What a package outside of the core may import besides the core and itself: frameworks, transports, other packages.
ALLOWED = {
    "plugins/hvdlm_torch": {"torch", "hvdlm_language"},
    "plugins/hvdlm_tensorflow": {"tensorflow", "hvdlm_language"},
    "plugins/hvdlm_compression": {"keras"},  # algorithms are written once for both frameworks, on keras.ops
    # Compressors; the planner's seconds of collectives.
    "plugins/hvdlm_auto": {"keras", "hvdlm_compression", "hvdlm_planner"},
    "plugins/hvdlm_exact": {"hvdlm_language"},  # the order of sums, which frameworks follow, too
    "plugins/hvdlm_corpora": set(),
    "plugins/hvdlm_diagnosis": set(),
    "plugins/hvdlm_language": set(),
    "plugins/hvdlm_telemetry": set(),
    "plugins/hvdlm_tools": {"hvdlm_inference", "hvdlm_language"},
    "plugins/hvdlm_planner": {"hvdlm_backends"},  # a world of one rank, to measure each by itself
    "plugins/hvdlm_tasks": {"hvdlm_corpora", "hvdlm_language"},  # unpacking, training of tokenizers; losses
    "plugins/hvdlm_tasks/torch_models": {"torch", "hvdlm_torch"},
    "plugins/hvdlm_tasks/tensorflow_models": {"tensorflow", "hvdlm_tensorflow"},
    "plugins/hvdlm_launchers": set(),
    "plugins/hvdlm_huggingface": {"hvdlm_corpora", "hvdlm_tools", "hvdlm_language"},  # tokenizer.json of a folder
    "plugins/hvdlm_report": set(),
    "plugins/hvdlm_steering": {"hvdlm_inference"},
    "plugins/hvdlm_inference": set(),
    "plugins/hvdlm_api": {"hvdlm_inference"},
    "plugins/hvdlm_lm_eval": {"hvdlm_inference", "hvdlm_language"},
    "plugins/hvdlm_trackers": set(),
    "plugins/hvdlm_testing": {"hvdlm_backends", "hvdlm_launchers"},
    "backends/hvdlm_backends": {*TRANSPORTS, "hvdlm_diagnosis"},
    "backends/hvdlm_horovod": {*TRANSPORTS},
}


def test_every_package_has_a_wall() -> None:
    folders = {
        str(path.relative_to(ROOT)) for name in ("plugins", "backends") for path in (ROOT / name).glob("hvdlm_*")
    }
    assert folders == {folder for folder in ALLOWED if folder.count("/") == 1}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_package_imports_only_what_it_may(folder: str) -> None:
    package = folder.split("/")[1]
    for path in sources(folder):
        if any(str(path).startswith(f"{ROOT / other}/") for other in ALLOWED if other.startswith(f"{folder}/")):
            continue  # that folder has a wall of its own
        for line, name in imports(path):
            allowed = ALLOWED[folder] | {package}
            assert name.split(".")[0] not in (TRANSPORTS | PLUGINS) - allowed, f"{path}:{line} imports {name}"


def test_building_horovod_needs_only_the_standard_library() -> None:
    names = ("user_folders", "safe_files", "file_lock", "lock_owner", "rank_context")
    own = ("hvdlm.errors", *(f"hvdlm.io.{name}" for name in names))
    files = [ROOT / f"{name.replace('.', '/')}.py" for name in own]
    for path in [*sources("backends/hvdlm_horovod"), *files]:
        for line, name in imports(path):
            known = name.split(".")[0] in sys.stdlib_module_names | {"hvdlm_horovod"} or name == "hvdlm.io"
            known = known or any(within(name, module) for module in own)
            assert known, f"{path}:{line} imports {name}"
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import hvdlm.io.file_lock, hvdlm.io.user_folders"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=60)


def test_the_walls_notice_an_import_inside_a_function(tmp_path: Path) -> None:
    breach = tmp_path / "breach.py"
    breach.write_text("def f():\n    from torch import nn\n")
    assert "torch" in [name for _, name in imports(breach)]


def test_help_and_plugin_lookup_load_no_framework() -> None:
    code = f"import sys; from hvdlm import cli; cli.main(['--help']); bad = {TRANSPORTS!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; assert not bad, bad"], check=True, capture_output=True, timeout=60)
