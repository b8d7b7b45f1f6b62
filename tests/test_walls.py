"""The walls of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRANSPORTS = {"torch", "tensorflow", "keras", "horovod", "mpi4py"}
ABOVE = {
    "hvdlm_torch",
    "hvdlm_tensorflow",
    "hvdlm_backends",
    "hvdlm_horovod",
    "hvdlm_compression",
    "hvdlm_sharding",
    "hvdlm_trackers",
}
FLOORS = {
    0: [
        "interfaces",
        "hookspecs",
        "config",
        "topology",
        "schedule",
        "models",
        "data",
        "tasks",
        "validate",
        "untrusted",
        "disk",
        "io",
        "plain_yaml",
        "terminal",
        "watch",
    ],
    1: [
        "loop",
        "run",
        "checkpoints",
        "control",
        "cursor",
        "guard",
        "base",
        "merged",
        "meeting",
        "record",
        "recovery",
        "scoring",
        "summary",
        "convert",
        "huggingface",
        "report",
        "scheduling",
        "telemetry",
        "plugins",
        "exchange",
        "loss_scale",
        "dryrun",
        "generate",
        "doctor",
        "bench",
    ],
    3: ["cli", "options", "schema", "supervision", "conformance", "__main__"],
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def floor(module: str) -> int | None:
    part = module.split(".")[1] if "." in module else ""
    return next((number for number, rooms in FLOORS.items() if part in rooms), None)


@pytest.mark.parametrize("path", sources("hvdlm"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_knows_no_framework_no_transport_and_nothing_above_its_floor(path: Path) -> None:
    own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for line, name in imports(path):
        assert name.split(".")[0] not in TRANSPORTS | ABOVE, f"{path}:{line} imports {name}"
        other = floor(name) if name.startswith("hvdlm.") else None
        if own is not None and other is not None:
            assert other <= own, f"{path}:{line}: floor {own} imports {name} of floor {other}"


@pytest.mark.parametrize(
    "folder, allowed", [("plugins/hvdlm_torch", "torch"), ("plugins/hvdlm_tensorflow", "tensorflow")]
)
def test_a_framework_plugin_knows_its_own_framework_and_how_models_are_cut(folder: str, allowed: str) -> None:
    forbidden = TRANSPORTS | ABOVE
    for path in sources(folder):
        for line, name in imports(path):
            known = {allowed, Path(folder).name, "hvdlm_sharding"}
            assert name.split(".")[0] not in forbidden - known, f"{path}:{line} imports {name}"


def test_sharding_knows_no_framework() -> None:
    for path in sources("plugins/hvdlm_sharding"):
        for line, name in imports(path):
            assert name.split(".")[0] not in (TRANSPORTS | ABOVE) - {"hvdlm_sharding"}, f"{path}:{line} imports {name}"


def test_compression_is_written_once_for_both_frameworks() -> None:
    for path in sources("plugins/hvdlm_compression"):
        for line, name in imports(path):
            assert name.split(".")[0] not in (TRANSPORTS | ABOVE) - {"keras", "hvdlm_compression"}, (
                f"{path}:{line} imports {name}"
            )


def test_trackers_know_no_framework_and_no_other_plugin() -> None:
    for path in sources("plugins/hvdlm_trackers"):
        for line, name in imports(path):
            assert name.split(".")[0] not in (TRANSPORTS | ABOVE) - {"hvdlm_trackers"}, f"{path}:{line} imports {name}"


def test_backends_know_no_plugin() -> None:
    for path in sources("backends/hvdlm_backends"):
        for line, name in imports(path):
            assert name.split(".")[0] not in ABOVE - {"hvdlm_backends"}, f"{path}:{line} imports {name}"


def test_what_builds_horovod_needs_the_standard_library_alone() -> None:
    own = {"hvdlm_horovod", "hvdlm.io.user_folders", "hvdlm.io.user_folders.user_cache"}
    for path in [*sources("backends/hvdlm_horovod"), ROOT / "hvdlm" / "io" / "user_folders.py"]:
        for line, name in imports(path):
            known = name in own or name.split(".")[0] in sys.stdlib_module_names | {"hvdlm_horovod"}
            assert known, f"{path}:{line} imports {name}"
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import hvdlm.io.user_folders"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)  # no package is there


def test_the_walls_are_tested_against_a_breach(tmp_path: Path) -> None:
    breach = tmp_path / "breach.py"
    breach.write_text("def f():\n    from torch import nn\n")
    assert "torch" in [name for _, name in imports(breach)]


def test_help_and_plugin_lookup_load_no_framework() -> None:
    code = (
        "import sys; from hvdlm import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"bad = {TRANSPORTS!r} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
