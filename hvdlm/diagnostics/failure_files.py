"""What ranks leave in RUN/flight_recorder for each other and for the doctor: ledgers, Python stacks, word of hangs and failures.

Everything is written under a temporary name and renamed, so that what is there is whole. All of it is untrusted.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hvdlm.diagnostics.recorder_reader import LedgerView, read_recorder
from hvdlm.errors import HvdlmError

_MOST_TEXT = 1 << 20  # bytes of a stack or a marker
_MOST_RANKS = 65536


@dataclass(frozen=True)
class Failure:
    """What a rank said of its end. ``own``: it failed by itself, not because its transport told it of another's."""

    rank: int
    message: str
    step: int = 0
    time: float = 0.0
    own: bool = True


@dataclass(frozen=True)
class Scene:
    """Everything that can be seen of a run's ranks from here.

    Attributes:
        views: every readable ledger, by rank.
        stacks: the Python stacks that ranks wrote when a hang was noticed, by rank.
        failures: what failed ranks said, by rank.
        unreadable: sentences about files that are none of these.
    """

    views: dict[int, LedgerView] = field(default_factory=dict)
    stacks: dict[int, str] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many ranks the run had."""
        return max((view.size for view in self.views.values()), default=0)


def read_scene(folder: Path) -> Scene:
    """Return what is in ``folder``; what can't be read is told, not raised."""
    views, unreadable = {}, []
    for path in _of_ranks(folder, "rank", "recorder"):
        try:
            view = read_recorder(path)
            views[view.rank] = view
        except HvdlmError as error:
            unreadable.append(str(error))
    return Scene(views, read_stacks(folder), read_failures(folder), tuple(unreadable))


def _of_ranks(folder: Path, kind: str, suffix: str) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if re.fullmatch(rf"{kind}-\d{{4,5}}\.{suffix}", name)][:_MOST_RANKS]


def _rank(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _read(path: Path) -> str:
    """Return a file's text, its beginning where it is large, without what a terminal obeys; "" where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            text = file.read(_MOST_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        pass  # there is nobody to tell: the sentences that follow say what is missing


def mark(folder: Path | None, name: str) -> bool:
    """Create the marker ``name``; return whether this process is the one that did, True where none can be made."""
    if folder is None:
        return True
    try:
        os.close(os.open(folder / f"{name}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def marked(folder: Path | None, name: str) -> bool:
    """Return whether the marker ``name`` is there."""
    return folder is not None and (folder / f"{name}.json").exists()


def await_word(until: Callable[[], bool], seconds: float) -> bool:
    """Wait that long until something is to be seen in the folder; return whether it is."""
    limit = time.monotonic() + seconds
    while not until():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def write_failure(folder: Path | None, failure: Failure) -> None:
    """Leave word of how a rank ended."""
    if folder is not None:
        content = {key: getattr(failure, key) for key in ("rank", "message", "step", "time", "own")}
        _write(folder / f"failed-{failure.rank:04d}.json", json.dumps(content))


def read_failures(folder: Path | None) -> dict[int, Failure]:
    """Return what failed ranks left, by rank."""
    found = {}
    for path in _of_ranks(folder, "failed", "json") if folder is not None else []:
        try:
            content = json.loads(_read(path))
            step, at = int(content["step"]), float(content["time"])
            failure = Failure(_rank(path), str(content["message"]), step, at, content["own"] is True)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        found[failure.rank] = failure
    return found


def write_stack(folder: Path, rank: int) -> None:
    """Write where every thread of this process is, the main thread first."""
    _write(folder / f"rank-{rank:04d}.stack", stack())


def stack() -> str:
    """Return the Python stacks of this process's threads, the main thread first, but for the calling one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames: dict[int, FrameType] = dict(sys._current_frames())
    frames.pop(threading.get_ident(), None)
    first = threading.main_thread().ident
    ordered = sorted(frames.items(), key=lambda item: item[0] != first)
    return "\n".join(_thread(names.get(ident, "a thread of a library"), frame) for ident, frame in ordered)


def _thread(name: str, frame: FrameType) -> str:
    lines = traceback.format_list(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=True)[::-1])
    return f"{name}, the innermost call last:\n" + "".join(lines)


def read_stacks(folder: Path) -> dict[int, str]:
    """Return the stacks that ranks wrote, by rank."""
    return {_rank(path): _read(path) for path in _of_ranks(folder, "rank", "stack")}


def stacked(folder: Path) -> set[int]:
    """Return the ranks that wrote their stacks."""
    return {_rank(path) for path in _of_ranks(folder, "rank", "stack")}


def say(folder: Path | None, text: str) -> None:
    """Print ``text`` on standard error, and leave it in the folder."""
    if folder is not None:
        _write(folder / "diagnosis.txt", text + "\n")
    print(text, file=sys.stderr, flush=True)


def failure_of(rank: int, error: BaseException, step: int, own: bool) -> Failure:
    """Return what a rank says of an error that ends it."""
    name = "" if isinstance(error, HvdlmError) else f"{type(error).__name__}: "
    return Failure(rank, f"{name}{gist(error)}"[:10000], step, time.time(), own)


def gist(error: BaseException) -> str:
    """Return an error's message; of a TensorFlow graph's, what is neither a stack nor the name of an operation."""
    text = re.sub(r"\[\[.*?\]\]|\[Op:.*?\]", "", str(error)).strip()
    if not text.startswith("Graph execution error"):
        return text
    frame = re.compile(r"Graph execution error|Detected at node|Traceback|Stack trace|\s+[^\s(]|$")
    return " ".join(dict.fromkeys(line.strip() for line in text.splitlines() if not frame.match(line))) or text


def ledger_folder(run: Any) -> Path:
    """Return where the ranks of the run in folder ``run`` leave what is described here."""
    return Path(run) / "flight_recorder"
