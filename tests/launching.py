"""Starting Python, launchers and plugins as a user would, and reading what runs have logged."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm_backends.probes import SPIN_COUNT, unpinned

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The framework and number of ranks of the launch that runs tests/parallel in this process.
FRAMEWORK = os.environ.get("HVDLM_TEST_FRAMEWORK", "torch")
RANKS = int(os.environ.get("HVDLM_TEST_RANKS", "1"))

# Options of a small run that takes seconds.
SMALL = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2"]
SMALL += ["--train.batch_size", "8", "--data.context", "32", "--log.every", "1"]
STEPS = ("--train.steps", "30", "--train.warmup", "5")


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without pinning of ranks and threads, with Python's folder first on PATH."""
    env = unpinned()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", TF_CPP_MIN_LOG_LEVEL="3")
    return env | variables


def run_command(
    command: list[str], cwd: Path = ROOT, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with these environment variables; return what it printed and its exit code."""
    env = environment(**variables)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", timeout=timeout)


@functools.cache
def warm_python(framework: str) -> str:
    """Return the address of a process that has imported ``framework`` and ends with this one (see warm_python.py)."""
    folder = Path(tempfile.mkdtemp(prefix="hvdlm-warm-"))
    command = [sys.executable, str(ROOT / "tests" / "warm_python.py"), str(folder / "socket"), framework]
    settings = environment(GOMP_SPINCOUNT=SPIN_COUNT, OPENBLAS_NUM_THREADS="1")
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
    atexit.register(shutil.rmtree, folder)
    atexit.register(process.communicate, timeout=60)
    wait_until((folder / "socket").exists, 120, process)
    return str(folder / "socket")


def _read_once(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those of some environment variables that are read when Python, its libraries or a framework are loaded."""
    return {name: value for name, value in variables.items() if name.startswith(READ_ONCE)}


READ_ONCE = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "TF_", "XLA_", "MALLOC_", "TORCH")
_AT_START = _read_once(environment())


def python(arguments: Sequence[str], **variables: str) -> list[str]:
    """Return the command ``python ARGUMENTS``, as a fork of a warm process where that makes no difference."""
    named = "--framework" in arguments[:-1]
    is_run = named or tuple(arguments[:2]) == ("-m", "hvdlm")
    if not is_run or _read_once(environment(**variables)) != _AT_START:
        return [sys.executable, *arguments]
    framework = arguments[arguments.index("--framework") + 1] if named else "none"
    address = warm_python(framework if framework in ("torch", "tensorflow") else "none")
    return [sys.executable, "-I", "-S", str(ROOT / "tests" / "warm_client.py"), address, *arguments]


def run_python(
    arguments: list[str], cwd: Path = ROOT, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` without a launcher."""
    return run_command(python(arguments, **variables), cwd, timeout, **variables)


def launch(
    launcher: str, ranks: int, arguments: list[str], timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` on ``ranks`` ranks; with one rank, without a launcher."""
    if ranks == 1:
        return run_python(arguments, timeout=timeout, **variables)
    name, *options = launcher.split()
    if name == "mpirun":
        options += ["--oversubscribe", "--bind-to", "none"]
    command = [name, *options, "-np", str(ranks), *python(arguments, **variables)]
    return run_command(command, timeout=timeout, **variables)


def wait_until(condition: Callable[[], Any], seconds: float = 60, process: subprocess.Popen | None = None) -> None:
    """Wait until ``condition()`` is true; fail after ``seconds``, and where ``process`` has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with code {process.returncode}: {process.communicate(timeout=10)[1]}")
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        time.sleep(0.02)


def processes_of(run: Path) -> list[str]:
    """Return the command lines of the processes of a run."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(run) in line and int(path.parent.name) != os.getpid():
            commands.append(line)
    return commands


def run_with_faults(
    folder: Path, framework: str, ranks: int, *options: str, **faults: Any
) -> subprocess.CompletedProcess:
    """Train a small model in ``folder`` with faults injected (see fault_injection.py)."""
    command = ["tests/fault_injection.py", "--framework", framework, "--log.run", str(folder), *SMALL, *STEPS]
    command += ["--checkpoint.every", "20", *options]
    return launch("mpirun", ranks, command, HVDLM_TEST_FAULTS=json.dumps(faults))


def read_rows(path: Path, ranks: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return (row, [(first, last, CRC-32) of every rank]) of every step of a run with the fault ``rows``."""
    each = [[json.loads(line) for line in Path(f"{path}.{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [(step[0][0], [tuple(values[1:]) for values in step]) for step in zip(*each, strict=True)]


def install(source: Path, target: Path) -> Path:
    """Install the package in ``source`` with pip into the folder ``target``; return it for ``PYTHONPATH``."""
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = run_python([*command, str(source)], PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    assert done.returncode == 0, done.stderr
    return target


def install_example(name: str, folder: Path) -> Path:
    """Install a copy of ``examples/plugins/NAME`` below ``folder``; return the folder for ``PYTHONPATH``."""
    shutil.copytree(ROOT / "examples" / "plugins" / name, folder / name)
    return install(folder / name, folder / "installed")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Return the loss of every step that a run has logged."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


WITH_STEP_HOOK = """
import os, signal, sys, time
from hvdlm import cli, hookimpl, telemetry

class StepHook:
    @hookimpl
    def hvdlm_run_started(self, world):
        self.world = world

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step):
        {action}

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), StepHook()]
sys.exit(cli.main())
"""


def with_step_hook(action: str) -> list[str]:
    """Return the arguments of Python that run ``python -m hvdlm`` with ``action`` at the end of every step."""
    return ["-c", WITH_STEP_HOOK.format(action=action)]
