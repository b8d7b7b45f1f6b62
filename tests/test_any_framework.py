"""A framework that only a plugin knows: over backend mpi4py, from numpy arrays, on the curve of the others."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from builders import both_frameworks
from launching import ROOT, SMALL, describe_package, launch, losses

# What may not branch on the name of a framework. The builds in hvdlm_horovod may: they compile Horovod's own sources,
# which it has for some frameworks only, in a folder each.
ROOMS = ["hvdlm", "backends/hvdlm_backends"]
NAMES = "torch|tensorflow|jax"
# A default, and a distribution whose version is listed where it is installed.
NAMED = {("hvdlm/config.py", "torch"), ("hvdlm/training/preflight.py", "tensorflow-cpu")}
SOURCE = Path(__file__).parent / "numpy_framework.py"
RECURRENT = [*SMALL, "--model.name", "rnn", "--train.steps", "12", "--train.warmup", "3", "--train.eval_every", "6"]


OWN_RULE = """
from types import SimpleNamespace

from hvdlm import hookimpl


@hookimpl
def hvdlm_optimizers():
    return {"own_rule": lambda train: SimpleNamespace(state=(), decoupled=True)}
"""


def names(source: str) -> list[tuple[int, str]]:
    """Return (line, string) of strings that name a framework, but for docstrings and sentences (advice to users)."""
    tree, matches = ast.parse(source), []
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in sentence(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            if re.search(rf"(?<![a-z])({NAMES})(?![a-z])", node.value) and " " not in node.value.strip():
                matches.append((node.lineno, node.value))
        if isinstance(node, ast.Attribute | ast.Name | ast.keyword):
            word = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None) or ""
            if re.fullmatch(rf"(horovod_)?({NAMES})(_\w+)?", word):
                matches.append((getattr(node, "lineno", 0), word))
    return matches


def sentence(node: ast.JoinedStr) -> list[ast.expr]:
    """Return what an f-string with spaces is made of."""
    text = "".join(value.value for value in node.values if isinstance(value, ast.Constant))
    return node.values if " " in text.strip() else []


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_branches_on_the_name_of_a_framework(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for line, name in names(path.read_text(encoding="utf-8")):
            assert (file, name) in NAMED, f"{file}:{line} knows {name}: its plugin has to provide what differs"


@pytest.mark.parametrize(
    "code",
    [
        'if framework == "torch": pass',
        'sys.modules["tensorflow"].function(call)',
        'hvd.__name__.endswith("tensorflow")',
        'hasattr(library, "horovod_torch_wait")',
        "import_module('torch._utils')",
        'GPUS = {"jax": 1}',
        "f'horovod.torch{x}'",
        "import x; x.torch.cuda",
    ],
)
def test_every_way_to_name_a_framework_is_noticed(code: str) -> None:
    assert names(code)
    assert not names('"""torch."""\nraise E("use --framework torch")\nf"pip install torch {x}"')


def test_the_named_exceptions_exist() -> None:
    for file, name in NAMED:
        assert name in [word for _, word in names((ROOT / file).read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder in which the plugin numpy_framework is installed."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copy(SOURCE, folder)
    describe_package(folder, "numpy_framework", {name: name for name in ("numpy_framework", "own_rule")})
    (folder / "own_rule.py").write_text(OWN_RULE)
    return str(folder)


def path_with(installed: str) -> str:
    """Return ``PYTHONPATH`` with the folder of the plugin."""
    return os.pathsep.join([installed, os.environ.get("PYTHONPATH", "")])


def train(installed: str, run: Path, framework: str, ranks: int, *options: str) -> list[float]:
    """Train a small recurrent model; return its losses."""
    command = ["-m", "hvdlm", *RECURRENT, "--framework", framework, "--log.run", str(run), *options]
    launcher = "threads" if framework == "torch" else "mpirun"
    done = launch(launcher, ranks, command, PYTHONPATH=path_with(installed))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads((run / "summary.json").read_text())["framework"] == framework
    return losses(run)


@pytest.mark.parametrize(
    "options",
    [
        ("--data.sampling", "sequential", "--train.micro_batch_size", "2"),
        ("--parallel.zero", "1", "--train.optimizer", "sgd", "--train.learning_rate", "0.1"),
        ("--communication.exchange", "local_sgd", "--communication.local.steps", "3", "--checkpoint.every", "6"),
    ],
    ids=["carried", "zero", "local_sgd"],
)
def test_a_framework_in_numpy_follows_torch_on_2_ranks(
    installed: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    curve = train(installed, tmp_path / "numpy", "numpy_framework", 2, *options)
    assert json.loads((tmp_path / "numpy" / "summary.json").read_text())["backend"] == "mpi4py"
    expected = train(installed, tmp_path / "torch", "torch", 2, *options)
    assert len(curve) == 12 and curve[-1] < curve[0]
    assert curve == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("first, second", [("torch", "numpy_framework"), ("numpy_framework", "torch")])
def test_a_checkpoint_moves_to_and_from_a_framework_in_numpy(
    installed: str, tmp_path: Path, first: str, second: str
) -> None:
    constant = ("--train.schedule", "constant")
    whole = train(installed, tmp_path / "whole", "torch", 1, *constant)
    begun = train(installed, tmp_path / "moved", first, 2, *constant, "--train.steps", "6")
    resumed = train(installed, tmp_path / "moved", second, 2, *constant, "--checkpoint.resume", "auto")
    assert resumed[:6] == begun and resumed == pytest.approx(whole, abs=1e-5)


def test_a_framework_unknown_to_horovod_gets_no_advice_to_build(installed: str, tmp_path: Path) -> None:
    command = ["-m", "hvdlm", *RECURRENT, "--framework", "numpy_framework", "--log.run", str(tmp_path / "run")]
    done = launch("mpirun", 2, [*command, "--backend", "mpi"], PYTHONPATH=path_with(installed))
    assert done.returncode == 2 and "Horovod has no operations for numpy_framework" in done.stderr, done.stderr
    assert "horovod build" not in done.stderr and "--backend mpi4py" in done.stderr


@both_frameworks
@pytest.mark.parametrize(
    "error", ["ImportError('libcudart.so: cannot open shared object file')", "RuntimeError('built for AVX')"]
)
def test_a_library_that_does_not_import_is_one_sentence(framework: str, error: str, tmp_path: Path) -> None:
    """A file is missing, a part is of another version, or the processor is too old."""
    (tmp_path / framework).mkdir()
    (tmp_path / framework / "__init__.py").write_text(f"raise {error}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "hvdlm", *RECURRENT, "--framework", framework, "--log.run", str(tmp_path / "run")]
    done = launch("", 1, command, PYTHONPATH=path)
    sentence = f"hvdlm: framework {framework} does not import, repair it: {error.replace('(', ': ')[:-1]}"
    assert done.returncode == 2 and done.stderr.strip() == sentence.replace("'", ""), done.stderr


def test_a_framework_without_plugins_optimizers_refuses_them(installed: str, tmp_path: Path) -> None:
    command = ["-m", "hvdlm", *RECURRENT, "--framework", "numpy_framework", "--log.run", str(tmp_path / "run")]
    done = launch("", 1, [*command, "--train.optimizer", "own_rule"], PYTHONPATH=path_with(installed))
    sentence = "hvdlm: train.optimizer own_rule: numpy_framework takes none of plugins: choose adamw."
    assert done.returncode == 2 and done.stderr.strip() == sentence, done.stderr
