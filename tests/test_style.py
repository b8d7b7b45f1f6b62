"""Rules for the tests themselves: short names, no wait without a deadline, and no test that can't fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py"))
LONGEST_NAME = 60

# Calls that may wait for ever, and how many positional arguments give them a time-out (None: only the keyword does).
WAITS: dict[str, int | None] = {
    "subprocess.run": None,
    "subprocess.call": None,
    "subprocess.check_call": None,
    "subprocess.check_output": None,
    "*.communicate": 2,
    "*.wait": 1,
    "*.join": 1,
    "*.get": 1,
    "*urlopen": 3,
}
# Waits whose deadline stands elsewhere: file, expression, where the deadline is.
EXCEPTIONS = [
    ("builders.py", "self._barrier.wait", "the barrier is made with a time-out"),
    ("parallel/*.py", "*.wait", "a handle takes none; the launch and --communication.timeout have one"),
    ("numpy_framework.py", "*.wait", "a handle takes none; the run's --communication.timeout has one"),
    ("test_threads.py", "*.wait", "a handle takes none; run_ranks has a time-out"),
    ("test_injected.py", "*.wait", "as above"),
    ("test_mpi4py_backend.py", "tensors.*.wait", "the handle is complete from the start"),
    ("alone/test_returned_arrays.py", "tensors.*.wait", "the handle is complete from the start"),
    ("warm/server.py", "os.wait", "conftest.py waits for the server with a time-out"),
    ("faulty_contracts.py", "gather(tensor, *.wait", "a handle takes none; the launch has one"),
]
# A call of these fails a test, like assert.
CHECKS = ("check_*", "assert_*", "*.assert_*", "pytest.raises", "pytest.fail", "wait_until", "*.check_input")


@cache
def parse(file: str) -> ast.Module:
    """Return the tree of a file of the tests."""
    return ast.parse((FOLDER / file).read_text())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield the test functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


@cache
def called(call: ast.Call) -> str:
    """Return the expression that is called."""
    return ast.unparse(call.func)


def is_called(call: ast.Call, *patterns: str) -> bool:
    return any(fnmatch(called(call), pattern) for pattern in patterns)


def waits_without_deadline(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what waits) of calls without a time-out, polling loops without a clock, and ``with Popen(...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg in ("timeout", None) for keyword in node.keywords):
            for pattern, needed in WAITS.items():
                if is_called(node, pattern) and (needed is None or len(node.args) < needed):
                    yield node.lineno, ast.unparse(node.func)
        if isinstance(node, ast.While):
            source = ast.unparse(node)
            waits = "sleep(" in source or all(isinstance(line, ast.Pass) for line in node.body)
            if waits and "monotonic()" not in source:
                yield node.lineno, "while"
        if isinstance(node, ast.With) and any("Popen(" in ast.unparse(item.context_expr) for item in node.items):
            yield node.lineno, "with Popen"


def can_fail(test: ast.FunctionDef) -> bool:
    """Return whether a test asserts something, calls a check, or runs a process that has to succeed."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            succeeds = any(k.arg == "check" and ast.unparse(k.value) == "True" for k in node.keywords)
            if succeeds or is_called(node, *CHECKS):
                return True
    return False


def is_tautology(test: ast.expr) -> bool:
    """Return whether an asserted expression is always true: a constant, ``x or True``, a tuple, ``x >= set()``."""
    if isinstance(test, ast.Tuple) or (isinstance(test, ast.Constant) and bool(test.value)):
        return True
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(map(is_tautology, test.values))
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.GtE):
        return ast.unparse(test.comparators[0]) == "set()"
    return False


@pytest.mark.parametrize("file", FILES)
def test_names_have_at_most_60_characters(file: str) -> None:
    names = [test.name for test in functions(parse(file))]
    assert [name for name in names if len(name) > LONGEST_NAME] == []
    assert len(set(names)) == len(names), "a test that is defined twice runs once"


@pytest.mark.parametrize("file", FILES)
def test_every_wait_has_a_deadline(file: str) -> None:
    patterns = [expression for name, expression, _ in EXCEPTIONS if fnmatch(file, name)]
    waits = waits_without_deadline(parse(file))
    assert [(line, call) for line, call in waits if not any(fnmatch(call, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("file", FILES)
def test_every_test_can_fail(file: str) -> None:
    tree = parse(file)
    assert [test.name for test in functions(tree) if not can_fail(test)] == []
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert [node.lineno for node in asserts if is_tautology(node.test)] == []


def test_exceptions_are_still_needed() -> None:
    for name, expression, _ in EXCEPTIONS:
        trees = [parse(file) for file in FILES if fnmatch(file, name)]
        assert any(fnmatch(call, expression) for tree in trees for _, call in waits_without_deadline(tree)), name


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run(['true'])",
        "process.communicate()",
        "thread.join()",
        "urllib.request.urlopen('http://localhost')",
        "queue.get()",
        "while not path.exists(): time.sleep(1)",
        "while not ready(): pass",
        "with subprocess.Popen(['true']) as process: pass",
    ],
)
def test_waits_without_a_deadline_are_recognised(code: str) -> None:
    assert len(list(waits_without_deadline(ast.parse(code)))) == 1


def test_tests_that_cannot_fail_are_recognised() -> None:
    tree = ast.parse("def test_a():\n    run()\n\ndef test_b():\n    with pytest.raises(ValueError):\n        run()")
    assert [can_fail(test) for test in functions(tree)] == [False, True]
    always = ["x or True", "('a' in x, 'b')", "1", "found >= set()"]
    assert all(is_tautology(ast.parse(code, mode="eval").body) for code in always)
    assert not is_tautology(ast.parse("x or y", mode="eval").body)
