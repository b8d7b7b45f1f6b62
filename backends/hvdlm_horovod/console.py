"""Prints the progress of a build, and runs its commands."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SHOWN_EVERY = 15.0  # seconds between two lines of progress


class BuildError(Exception):
    """Why Horovod can't be built here and what to do, in one sentence or a few lines."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"hvdlm: {text}", flush=True)


def run(
    command: Sequence[str],
    log: Path,
    what: str,
    explain: Callable[[str], str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run ``command``, append its output to ``log``, and print its progress.

    Raises:
        BuildError: it failed; the text is ``explain(output)``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=cwd, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        shown = started
        for line in process.stdout:
            file.write(line)
            percent = re.search(r"\[\s*(\d+)%\]", line)
            if percent and time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                say(f"  {what}: {percent[1]}% compiled after {shown - started:.0f} s")
    if process.wait() != 0:
        with log.open("rb") as file_bytes:
            file_bytes.seek(begin)
            output = file_bytes.read().decode(errors="replace")
        raise BuildError(f"{what} failed: {explain(output)}")
    say(f"  {what}: done in {time.monotonic() - started:.0f} s")


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
    """Return the output of a short command on both streams; "" if it can't be run."""
    try:
        done = subprocess.run(
            command,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def first_line(text: str) -> str:
    """Return the first line of ``text`` that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def search_path(*folders: Path, env: Mapping[str, str] = os.environ) -> str:
    """Return PATH with ``folders`` in front."""
    return os.pathsep.join([*map(str, folders), env.get("PATH", os.defpath)])
