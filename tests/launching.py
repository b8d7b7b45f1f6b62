"""Starts Python on several ranks, as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hvdlm.diagnostics.probes import unpinned

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HVDLM_DATA", ROOT.parent / "shared" / "data"))

# Options of a small run that takes seconds.
SMALL = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2"]
SMALL += ["--train.batch_size", "8", "--data.context", "32", "--log.every", "1"]
STEPS = ("--train.steps", "30", "--train.warmup", "5")


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what pins threads or ranks, with the .venv's programs first."""
    env = unpinned()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", TF_CPP_MIN_LOG_LEVEL="3")
    return env | more


def launch(
    launcher: str, ranks: int, arguments: list[str], timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` on ``ranks`` ranks; with one rank, without a launcher."""
    command = [sys.executable, *arguments]
    if ranks > 1:
        name, *options = launcher.split()
        if name == "mpirun":
            options += ["--oversubscribe", "--bind-to", "none"]
        command = [name, *options, "-np", str(ranks), *command]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def install(source: Path, target: Path) -> Path:
    """Install the package in ``source`` with pip into the folder ``target``, and return that: for ``PYTHONPATH``."""
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = launch("", 1, [*command, str(source)], PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    assert done.returncode == 0, done.stderr
    return target


def install_example(name: str, folder: Path) -> Path:
    """Install ``examples/plugins/NAME`` below ``folder``; what building leaves behind stays there too."""
    shutil.copytree(ROOT / "examples" / "plugins" / name, folder / name)
    return install(folder / name, folder / "installed")


def losses(run: Path) -> list[float]:
    """Return the loss of every step that a run has logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


WITH_A_PLUGIN = """
import os, signal, sys, time
from hvdlm import cli, hookimpl, telemetry

class Meddler:
    @hookimpl
    def hvdlm_run_started(self, world):
        self.world = world

    @hookimpl(trylast=True)
    def hvdlm_step_ended(self, step):
        {action}

plugins = telemetry.default_plugins
telemetry.default_plugins = lambda config: [*plugins(config), Meddler()]
sys.exit(cli.main())
"""


def meddled(action: str) -> list[str]:
    """Return the arguments that run ``python -m hvdlm`` with ``action`` at the end of every step."""
    return ["-c", WITH_A_PLUGIN.format(action=action)]
