"""Common fixtures; tests in ``tests/parallel`` and ``tests/alone`` are run by test_launches.py alone.

The former run on every rank of a launch, the latter in one process per framework.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdlm.training.signals import SIGNALS
from hvdlm_backends.probes import SPIN_COUNT
from launching import SMALL, WARM, end_started_by, launch, start_warm

sys.path.append(WARM)
import packages

# Tests start Python hundreds of times: each start would compile the package's modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# OpenMP threads of this process, too, would spin for the core of whom they wait for: twice the time of a small model.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
# Worlds of ranks that are threads of this process need a thread of TensorFlow for each rank, whichever test starts it;
# commands have their own number (launching.environment).
if "HVDLM_TEST_FRAMEWORK" not in os.environ:
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "8")
# Open MPI's module for libfabric, which nothing here communicates through, ends a second after all others.
os.environ.setdefault("OMPI_MCA_btl", "^ofi")
# Workers have more ranks than a machine of two cores: a rank that spins takes the core of whom it waits for.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
# Steps of tests, which run side by side, are no grade of the measurements of this machine.
os.environ["HVDLM_HARDWARE"] = str(Path(__file__).parent / "not_measured.yaml")

_LAUNCHED = ("parallel", "alone")
collect_ignore = (
    [] if "HVDLM_TEST_FRAMEWORK" in os.environ else [str(Path(__file__).parent / name) for name in _LAUNCHED]
)


# The files that take longest, which the workers begin with, so that they end at about the same time.
_LONGEST = """
launches snippets benchmarks jax_example conformance train chaos results published_state hangs hybrid_runs
auto launcher_signals trainables lora compatibility gpu_kit exact threads faults python_api hostile
reading_models run_command supervise simulated_threads bare_machines attention templates one_run_a_folder
steering
""".split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what other tests cover, and run the longest files first, so that workers end at about the same time.

    ``@pytest.mark.full(covered_by="...")`` marks a test, or one of its cases, of which other tests run the same code;
    ``make full`` runs these, too.
    """
    marked = [(item, mark) for item in items if (mark := item.get_closest_marker("full"))]
    unexplained = [item.nodeid for item, mark in marked if not mark.kwargs.get("covered_by")]
    if unexplained:
        raise pytest.UsageError(f"these tests don't say what covers them, by full(covered_by=...): {unexplained}")
    if "HVDLM_TEST_FULL" not in os.environ:
        config.hook.pytest_deselected(items=[item for item, _ in marked])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    order = {f"test_{name}.py": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """Refuse a module of tests that imports TensorFlow, which changes the environment: no command would be warm."""
    if "tensorflow" in sys.modules and "HVDLM_TEST_FRAMEWORK" not in os.environ:
        raise pytest.UsageError("a module of tests imports tensorflow: import it within the tests (tests/conftest.py).")


def pytest_configure(config: pytest.Config) -> None:
    """Start the processes of which commands of tests are forks; the workers of a session share them."""
    packages.remember()
    os.environ.setdefault("HVDLM_TEST_SESSION", str(os.getpid()))
    if "HVDLM_TEST_WARM" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="hvdlm-warm-"))
        process = start_warm(folder)
        config.add_cleanup(lambda: (process.communicate(timeout=60), shutil.rmtree(folder)))


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """End what a failed test has left running."""
    end_started_by(node.nodeid)


_imported: set[str] = set()


def pytest_runtest_setup() -> None:
    """Leave what imports of frameworks have made out of garbage collections, which would take half a second each."""
    imported = {"torch", "tensorflow"} & sys.modules.keys()
    if imported - _imported:
        _imported.update(imported)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # graphs that are traced are mostly kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Undo what a test, or a command that it or a fixture runs in this process, changes in signals.

    A run ignores signals when it has saved, and all commands that later tests start would inherit that. Around the
    whole test, since fixtures of a module are set up before those of a test.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        return (yield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """Undo what a test, or a command that it runs in this process, changes in the environment."""
    before = dict(os.environ)
    yield
    if before != os.environ:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def build_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return this environment as one to build Horovod for, with an empty cache and no package index."""
    from build_stubs import isolated_target

    return isolated_target(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains once per set of options and returns the run's folder."""
    runs: dict[tuple, Path] = {}

    def train(framework: str, ranks: int, *options: str, launcher: str = "threads") -> Path:
        key = (framework, ranks, options, launcher)
        if key not in runs:
            run = tmp_path_factory.mktemp("run")
            arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(run), *SMALL, *options]
            finished = launch(launcher, ranks, arguments)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
            runs[key] = run
        return runs[key]

    return train
