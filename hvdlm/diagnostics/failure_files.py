"""Files in RUN/flight_recorder about hangs and failures, for other ranks and the doctor: stacks and errors.

Files are written under a temporary name and renamed, so that they are always complete. All content is untrusted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hvdlm.diagnostics.flight_recorder import MOST_RANKS
from hvdlm.errors import FAILED, HvdlmError
from hvdlm.io import rank_context, safe_files, untrusted_input, value_checks
from hvdlm.io.terminal import printable

HANG, REPORTED = "hang", "told"
"""Markers: a rank has noticed a hang; a rank has reported (on standard error) why the run ends."""

_MAX_BYTES = 1 << 20  # read of a stack or an error
_FAILURE = value_checks.fields(
    {
        "message": value_checks.text,
        "step": value_checks.count(),
        "time": value_checks.number(0),
        "own": value_checks.flag,
    },
    {"code": value_checks.count(high=255)},
)
_PHASE = value_checks.fields(
    {
        "phase": value_checks.text,
        "host": value_checks.text,
        "beat": value_checks.number(),
        "waits": value_checks.flag,
        "pid": value_checks.count(),
        "seconds": value_checks.number(),
    }
)


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank; ``is_cause``: False where its transport reported another rank's failure."""

    rank: int
    message: str
    step: int = 0
    time: float = 0.0
    is_cause: bool = True
    code: int = FAILED


def files_of_ranks(folder: Path, kind: str, suffix: str) -> list[Path]:
    """Return the files ``KIND-RANK.SUFFIX`` in ``folder``, by rank."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if re.fullmatch(rf"{kind}-\d{{4,5}}\.{suffix}", name)][:MOST_RANKS]


def rank_of(path: Path) -> int:
    """Return the rank that a file's name ends with."""
    return int(path.stem.partition("-")[2])


def read_text(path: Path) -> str:
    """Return the beginning of a file's text, safe for a terminal; "" where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    return printable(text)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with safe_files.create(temporary) as file:
            file.write(text.encode())
        temporary.replace(path)
    except OSError:
        pass  # the run is ending anyway, and the diagnosis names the ranks whose files are missing


def create_marker(folder: Path | None, name: str) -> bool:
    """Create the marker ``name``; return whether this process created it, True also where the folder isn't writable."""
    if folder is None:
        return True
    try:
        os.close(os.open(folder / f"{name}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def has_marker(folder: Path | None, name: str) -> bool:
    """Return whether the marker ``name`` exists."""
    return folder is not None and (folder / f"{name}.json").exists()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``condition`` is true, at most ``seconds``; return whether it is."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def write_failure(folder: Path | None, failure: Failure) -> None:
    """Write the error that ended a rank."""
    if folder is not None:
        content = {key: getattr(failure, key) for key in ("rank", "message", "step", "time", "code")}
        content["own"] = failure.is_cause
        _write(folder / f"failed-{failure.rank:04d}.json", json.dumps(content))


def read_failures(folder: Path | None) -> dict[int, Failure]:
    """Return the error of each failed rank."""
    failures = {}
    for path in files_of_ranks(folder, "failed", "json") if folder is not None else []:
        try:
            content = untrusted_input.parse_json(read_text(path))
            _FAILURE(content, "")
        except ValueError:
            continue
        # JSON spells control characters out: they are there only now.
        message = printable(content["message"]).strip() or "it left no message"
        step, seconds, code = content["step"], float(content["time"]), content.get("code", FAILED)
        failure = Failure(rank_of(path), message, step, seconds, content["own"], code)
        failures[failure.rank] = failure
    return failures


def read_phases(folder: Path) -> dict[int, dict[str, Any]]:
    """Return what each rank was doing, of those that have written it (``phases.Process.write``)."""
    phases = {}
    for path in files_of_ranks(folder, "phase", "json"):
        try:
            content = untrusted_input.parse_json(read_text(path))
            _PHASE(content, "")
        except ValueError:
            continue
        phases[rank_of(path)] = content | {key: printable(content[key][:200]) for key in ("phase", "host")}
    return phases


def within(seconds: float, action: Callable[[], Any], default: Any) -> Any:
    """Return ``action()``, or ``default`` where it takes longer than ``seconds``: what it asks may not respond."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else default


def write_stack(folder: Path, rank: int) -> None:
    """Write the Python stacks of this rank's threads."""
    _write(folder / f"rank-{rank:04d}.stack", python_stacks())


def python_stacks() -> str:
    """Return the Python stacks of this rank's threads except the calling one, the main thread first."""
    names = {thread.ident: thread.name for thread in rank_context.threads()}
    frames: dict[int, FrameType] = dict(sys._current_frames())
    frames.pop(threading.get_ident(), None)
    if rank_context.current():
        frames = {ident: frame for ident, frame in frames.items() if ident in names}
    first = rank_context.main_thread().ident
    ordered = sorted(frames.items(), key=lambda item: item[0] != first)
    return "\n".join(_thread(names.get(ident, "a thread of a library"), frame) for ident, frame in ordered)


def _thread(name: str, frame: FrameType) -> str:
    lines = traceback.format_list(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=True)[::-1])
    return f"{name}, the innermost call last:\n" + "".join(lines)


def read_stacks(folder: Path) -> dict[int, str]:
    """Return the stacks of each rank that wrote them."""
    return {rank_of(path): read_text(path) for path in files_of_ranks(folder, "rank", "stack")}


def ranks_with_stacks(folder: Path) -> set[int]:
    """Return the ranks that have written their stacks."""
    return {rank_of(path) for path in files_of_ranks(folder, "rank", "stack")}


def report(folder: Path | None, text: str) -> None:
    """Print why the run ends on standard error, and write it to ``diagnosis.txt``."""
    text = printable(text)
    print(text, file=sys.stderr, flush=True)  # first: the file system may not respond
    write_diagnosis(folder, text)


def write_diagnosis(folder: Path | None, text: str) -> None:
    """Write why the run ends to ``diagnosis.txt``."""
    if folder is not None:
        _write(folder / "diagnosis.txt", text + "\n")


def make_failure(rank: int, error: BaseException, step: int, is_cause: bool) -> Failure:
    """Return the failure of a rank that ``error`` ends."""
    name = "" if isinstance(error, HvdlmError) else f"{type(error).__name__}: "
    return Failure(rank, f"{name}{short_message(error)}"[:10000], step, time.time(), is_cause)


def short_message(error: BaseException) -> str:
    """Return an error's message, that of a TensorFlow graph without stacks and names of operations."""
    text = re.sub(r"\[\[.*?\]\]|\[Op:.*?\]", "", str(error)).strip()
    if not text.startswith("Graph execution error"):
        return text
    frame = re.compile(r"Graph execution error|Detected at node|Traceback|Stack trace|\s+[^\s(]|$")
    return " ".join(dict.fromkeys(line.strip() for line in text.splitlines() if not frame.match(line))) or text


def files_folder(run: Any) -> Path:
    """Return the folder of these files for the run in folder ``run``."""
    return Path(run) / "flight_recorder"
