"""The Python environment that Horovod is built for: its interpreter, folders and installed packages."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hvdlm_horovod import failures
from hvdlm_horovod.console import BuildError, first_line, run, search_path

# The distributions that provide a framework; the first is that of hvdlm's extra of the same name.
FRAMEWORKS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow-cpu", "tensorflow", "tensorflow-gpu", "tensorflow-rocm", "intel-tensorflow"),
}
TENSORFLOW_LAST = (3, 13)  # the newest Python that the pinned TensorFlow has wheels for
_FACTS = """
import importlib.metadata, json, os, platform, sys, sysconfig
packages = {}
for one in importlib.metadata.distributions():
    name = (one.metadata or {}).get("Name")
    if name: packages.setdefault(name.lower().replace("_", "-"), one.version)
stdlib = sysconfig.get_path("stdlib")
print(json.dumps({
    "prefix": sys.prefix, "include": sysconfig.get_path("include"), "version": platform.python_version(),
    "tag": f"{sys.implementation.cache_tag}-{platform.machine()}", "site": sysconfig.get_path("platlib"),
    "libc": "-".join(platform.libc_ver()), "packages": packages, "search": [one for one in sys.path if one],
    "managed": sys.prefix == sys.base_prefix and os.path.exists(os.path.join(stdlib, "EXTERNALLY-MANAGED")),
}))
"""


@dataclass(frozen=True)
class Target:
    """A Python environment.

    Attributes:
        packages: versions by the names of distributions.
        search: the folders of ``sys.path``: packages may lie in those of another environment.
    """

    python: str
    prefix: Path
    include: Path
    site: Path
    version: str
    tag: str
    libc: str
    packages: dict[str, str]
    managed: bool
    search: tuple[str, ...] = ()

    @property
    def scripts(self) -> Path:
        """The folder of the interpreter and of the environment's programs."""
        return Path(self.python).parent

    def environment(self) -> dict[str, str]:
        """Return environment variables for commands, with the target's programs first on PATH."""
        env = dict(os.environ, PATH=search_path(self.scripts))
        env.pop("PYTHONHOME", None)
        if self.prefix.joinpath("pyvenv.cfg").exists():
            env["VIRTUAL_ENV"] = str(self.prefix)
        return env

    @property
    def key(self) -> dict[str, str]:
        """The key of the environment's log and lock."""
        return {"prefix": str(self.prefix)}

    def framework(self, name: str) -> tuple[str, str] | None:
        """Return the distribution and version that provide a framework, or None."""
        return next(((d, self.packages[d]) for d in FRAMEWORKS[name] if d in self.packages), None)

    def pip(
        self, arguments: list[str], log: Path, what: str, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        """Run pip in the target.

        Raises:
            BuildError: it failed; the text says why and what to do.
        """
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        env = env or self.environment()
        run(command, log, what, lambda output: failures.explain(output, log, self.version), env, cwd)

    def code(self, code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python code in the target; return the finished process with its output."""
        command = [self.python, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=env or self.environment())


def inspect(python: str) -> Target:
    """Return the environment of the interpreter ``python``.

    Raises:
        BuildError: it does not start.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    try:
        done = subprocess.run([python, "-c", _FACTS], capture_output=True, text=True, errors="replace", env=env)
    except OSError as error:
        raise BuildError(f"{python} does not start: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"{python} does not start: {first_line(done.stderr[-300:])}")
    facts = json.loads(done.stdout)
    facts |= {name: Path(facts[name]) for name in ("prefix", "include", "site")}
    return Target(python=python, **{**facts, "search": tuple(facts["search"])})


def no_wheels(framework: str, python: str) -> str:
    """Return a clause about a framework without wheels for this Python; "" if it has wheels."""
    if framework == "tensorflow" and tuple(map(int, python.split(".")[:2])) > TENSORFLOW_LAST:
        newest = ".".join(map(str, TENSORFLOW_LAST))
        return f"; TensorFlow has no wheel for Python {python}: use Python 3.10 to {newest}, or PyTorch"
    return ""


def read_only(checkout: Path) -> str | None:
    """Return what to do where ``checkout`` can't be written, else None: ``make`` keeps its environment there."""
    if os.access(checkout, os.W_OK):
        return None
    return (
        f"{checkout} can't be written, and make sets up .venv and writes runs there: run it in a copy of the folder: "
        f"cp -r {checkout} NEW_FOLDER && cd NEW_FOLDER && make setup"
    )
