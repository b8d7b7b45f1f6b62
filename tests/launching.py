"""Starting Python, launchers and plugins as a user would, and reading what runs have logged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvdlm_backends.probes import SPIN_COUNT, unpinned

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))

WARM = str(ROOT / "tests" / "warm")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The framework, number of ranks and backend of the launch that runs tests/parallel in this process.
FRAMEWORK = os.environ.get("HVDLM_TEST_FRAMEWORK", "torch")
RANKS = int(os.environ.get("HVDLM_TEST_RANKS", "1"))
BACKEND = os.environ.get("HVDLM_TEST_BACKEND", "")  # that of the launcher, unless it is given

# Options of a small run that takes seconds. It evaluates two batches, of one shape, for which TensorFlow traces one
# graph; threads of PyTorch would wait for each other longer than they compute.
SMALL = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2"]
SMALL += ["--train.batch_size", "8", "--data.context", "32", "--log.every", "1"]
SMALL += ["--data.validation_share", "0.0044", "--train.threads", "1"]
STEPS = ("--train.steps", "30", "--train.warmup", "5")
# TensorFlow takes longer to build the graphs of two layers than to train them.
ONE_LAYER = ("--model.layers", "1")


def start_warm(folder: Path) -> subprocess.Popen:
    """Let the commands that tests start be forks of processes that have imported their framework (see warm/server.py).

    They end with the standard input of the process that is returned. ``HVDLM_TEST_WARM=`` starts all commands afresh.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), WARM)))
    os.environ["HVDLM_TEST_WARM"] = str(folder)
    settings = environment(HVDLM_TEST_WARM="", GOMP_SPINCOUNT=SPIN_COUNT, OPENBLAS_NUM_THREADS="1")
    (folder / "environment.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        command = [sys.executable, f"{WARM}/server.py", str(folder)]
        return subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=log, stderr=log)


def start_warm_jax(path: str) -> None:
    """Let commands with JAX be forks of a process that has imported it from ``path``, with this environment, too."""
    if folder := os.environ.get("HVDLM_TEST_WARM"):
        Path(folder, "jax.json").write_text(json.dumps(environment(PYTHONPATH=path, HVDLM_TEST_WARM="")))


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without pinning of ranks and threads, with Python's folder first on PATH."""
    env = unpinned()
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] += f"{os.pathsep}{WARM}"
    if "XDG_CACHE_HOME" in variables:
        env.pop("HVDLM_HARDWARE", None)  # that of the test's own cache
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", TF_CPP_MIN_LOG_LEVEL="3")
    return env | variables


def run_command(
    command: list[str], cwd: Path = ROOT, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with these environment variables; return what it printed and its exit code."""
    env = environment(**variables)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", timeout=timeout)


def run_python(
    arguments: list[str], cwd: Path = ROOT, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` without a launcher."""
    return run_command([sys.executable, *arguments], cwd, timeout, **variables)


def launch(
    launcher: str, ranks: int, arguments: list[str], timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` on ``ranks`` ranks; with one rank, without a launcher.

    The launcher ``threads`` starts one process, a command of hvdlm whose ranks are threads.
    """
    if launcher == "threads" and ranks > 1:
        arguments = [*arguments, "--ranks", str(ranks)]
    if ranks == 1 or launcher == "threads":
        return run_python(arguments, timeout=timeout, **variables)
    name, *options = launcher.split()
    if name == "mpirun":
        options += ["--oversubscribe", "--bind-to", "none"]
    command = [name, *options, "-np", str(ranks), sys.executable, *arguments]
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


def end_started_by(test: str) -> list[str]:
    """Kill what a test's body has started and left running, by its environment; return the command lines.

    A launch that waits for a rank that is gone would take a core from all later tests.
    """
    variables = {"HVDLM_TEST_SESSION": os.environ.get("HVDLM_TEST_SESSION"), "PYTEST_CURRENT_TEST": f"{test} (call)"}
    own = {f"{name}={value}".encode() for name, value in variables.items()}
    ended = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if own <= set((folder / "environ").read_bytes().split(b"\0")) and int(folder.name) != os.getpid():
                ended.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it has ended, or is another user's
            continue
    return ended


def run_with_faults(
    folder: Path, framework: str, ranks: int, *options: str, launcher: str = "", **faults: Any
) -> subprocess.CompletedProcess:
    """Train a small model in ``folder`` with faults injected (see fault_injection.py).

    Without a ``launcher``, ranks are threads, unless one of them is sent a signal: that takes processes.
    """
    launcher = launcher or ("mpirun" if "signals" in faults else "threads")
    command = ["tests/fault_injection.py", "--framework", framework, "--log.run", str(folder), *SMALL, *STEPS]
    command += ["--checkpoint.every", "20", *options]
    return launch(launcher, ranks, command, HVDLM_TEST_FAULTS=json.dumps(faults))


def read_rows(path: Path, ranks: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return (row, [(first, last, CRC-32) of every rank]) of every step of a run with the fault ``rows``."""
    each = [[json.loads(line) for line in Path(f"{path}.{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [(step[0][0], [tuple(values[1:]) for values in step]) for step in zip(*each, strict=True)]


def install(source: Path, target: Path, *others: Path) -> Path:
    """Install the packages in ``source`` and ``others`` with pip into the folder ``target``; return it."""
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    sources = [str(path) for path in (source, *others)]
    done = run_python([*command, *sources], PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    assert done.returncode == 0, done.stderr
    return target


def install_example(name: str, folder: Path, *others: str) -> Path:
    """Install copies of ``examples/plugins/NAME`` and others below ``folder``; return the folder for ``PYTHONPATH``."""
    for one in (name, *others):
        shutil.copytree(ROOT / "examples" / "plugins" / one, folder / one)
    return install(folder / name, folder / "installed", *(folder / one for one in others))


def describe_package(folder: Path, name: str, entries: Mapping[str, str]) -> Path:
    """Let the modules in ``folder`` be those of an installed package with these entry points; return the folder."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = "\n".join(f"{entry} = {module}" for entry, module in entries.items())
    (info / "entry_points.txt").write_text(f"[hvdlm]\n{lines}\n")
    return folder


def place_example(name: str, folder: Path) -> Path:
    """Place ``examples/plugins/NAME`` in ``folder`` as pip would install it, in no time; return the folder."""
    source = ROOT / "examples" / "plugins" / name
    hidden = shutil.ignore_patterns("tests", "pyproject.toml", "__pycache__")
    shutil.copytree(source, folder, ignore=hidden, dirs_exist_ok=True)
    section = (
        (source / "pyproject.toml").read_text().partition("[project.entry-points.hvdlm]\n")[2].partition("\n\n")[0]
    )
    entries = dict(line.replace('"', "").split(" = ") for line in section.splitlines())
    return describe_package(folder, name, entries)


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
