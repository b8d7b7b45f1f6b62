"""One rank's error ends all ranks, and is told once.

A rank that fails by itself leaves word in RUN/flight_recorder and speaks. A rank whose transport tells it of another's end looks
for that word first, and then has nothing to add. Where the transport refuses what ranks handed over (another shape or
dtype), all get the same error, and the first of them tells what their ledgers show.
"""

from __future__ import annotations

import re
import time
import traceback
from pathlib import Path
from typing import Any

from hvdlm.diagnostics import diagnosis, failure_files
from hvdlm.diagnostics.failure_files import Failure
from hvdlm.errors import HvdlmError, RankError

_WORD_SECONDS = 3.0  # for which another rank's word is waited for
_TURN_SECONDS = 1.0  # after which the next rank speaks, where the one before it does not
_LEAVE_SECONDS = 2.0  # in which the rank that speaks may end all
_LIBRARY = re.compile(r"horovod|\bmpi_|has been shut down|mismatched \w+ (tensor|operation|data)|gloo/", re.I)


def of_transport(error: BaseException) -> bool:
    """Return whether ``error`` comes from Horovod or MPI, perhaps through a framework, and so may be another rank's."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "mpi4py.MPI.Exception" in kinds or any(kind.endswith(".HorovodInternalError") for kind in kinds):
        return True
    if not any(kind.startswith("tensorflow.") or kind == "builtins.RuntimeError" for kind in kinds):
        return False
    return bool(_LIBRARY.search(failure_files.gist(error)))


def end(world: Any, error: BaseException) -> None:
    """Tell ``error`` once among all ranks, and end them; does not return."""
    recorder = world.recorder
    recorder.failing = True
    recorder.flush()
    own = not of_transport(error)
    if own or not _others_word(recorder.folder, world.rank):
        failure_files.write_failure(
            recorder.folder, failure_files.failure_of(world.rank, error, recorder.current_step, own)
        )
        if not own:
            time.sleep(_TURN_SECONDS * world.rank)
        if failure_files.mark(recorder.folder, "told"):
            tell(world, error, own)
            world.abort(1)
    time.sleep(_LEAVE_SECONDS)  # whose word it is ends this rank too, most often
    world.abort(1)


def told_elsewhere(recorder: Any) -> bool:
    """Return whether another rank has failed, or told why all end: a signal is then the launcher's, not the user's."""
    folder = recorder.folder
    return failure_files.marked(folder, "told") or bool(failure_files.read_failures(folder))


def refuse(world: Any, error: HvdlmError, prefix: str) -> None:
    """Tell ``error``, which is the user's to mend, once among all ranks, and end them with code 2."""
    recorder = world.recorder
    recorder.failing = True
    recorder.flush()
    failure_files.write_failure(
        recorder.folder, failure_files.failure_of(world.rank, error, recorder.current_step, own=True)
    )
    if failure_files.mark(recorder.folder, "told"):
        failure_files.say(recorder.folder, f"{prefix}{error}")
    else:
        time.sleep(_LEAVE_SECONDS)
    world.abort(2)


def _others_word(folder: Path | None, rank: int) -> bool:
    """Return whether another rank failed by itself; it has a moment to say so."""

    def found() -> bool:
        return any(failure.own for r, failure in failure_files.read_failures(folder).items() if r != rank)

    return folder is not None and failure_files.await_word(found, _WORD_SECONDS)


def tell(world: Any, error: BaseException, own: bool) -> None:
    """Print what ended this rank; of what the transport refused, what the ledgers show."""
    if own and not isinstance(error, (RankError, HvdlmError)):
        traceback.print_exception(error)
    failure: Failure = failure_files.failure_of(world.rank, error, world.recorder.current_step, own)
    text = f"hvdlm: rank {world.rank} failed: {failure.message}"
    if not own and world.recorder.folder is not None:
        scene = failure_files.read_scene(world.recorder.folder)
        text = "\n".join([text, *diagnosis.refused(scene, time.time())])
    failure_files.say(world.recorder.folder, text)
