"""Ends all ranks when one fails, and reports the error once.

A rank that fails by itself writes its error to RUN/flight_recorder and reports it. A rank whose transport reports the
end of another rank first looks for that rank's error, and reports nothing if there is one. Where the transport refuses
a collective (ranks gave different shapes or dtypes), all ranks get the same error, and the first of them reports it
with the difference between the flight recorders.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvdlm.diagnostics import failure_files
from hvdlm.diagnostics.explanations import diagnosis
from hvdlm.diagnostics.failure_files import Failure
from hvdlm.diagnostics.phases import process
from hvdlm.errors import BAD_INPUT, HvdlmError, RankError
from hvdlm.io.terminal import printable

if TYPE_CHECKING:
    from hvdlm.diagnostics.flight_recorder import FlightRecorder
    from hvdlm.protocols.world import World

_ERROR_SECONDS = 3.0  # waited for the error of another rank
_TURN_SECONDS = 1.0  # after which the next rank reports, if the one before it has not
_ABORT_SECONDS = 2.0  # in which the rank that reports may end all ranks
_EXPLAIN_SECONDS = 20.0  # in which the recordings are read: the file system may not respond
_TRANSPORT = re.compile(r"horovod|\bmpi_|has been shut down|mismatched \w+ (tensor|operation|data)|gloo/", re.I)


def is_transport_error(error: BaseException) -> bool:
    """Return whether Horovod or MPI raised ``error``, perhaps through a framework: the cause may be another rank."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if any(kind.endswith(("mpi4py.MPI.Exception", ".HorovodInternalError", ".RanksEnded")) for kind in kinds):
        return True
    own = ("builtins.", "hvdlm")  # other classes are those of a framework, which wraps the transport's error
    if all(kind.startswith(own) and kind != "builtins.RuntimeError" for kind in kinds):
        return False
    return bool(_TRANSPORT.search(failure_files.short_message(error)))


def end(world: World, error: BaseException) -> None:
    """Report ``error`` once among all ranks and end them; does not return."""
    recorder = world.recorder
    recorder.failing = True
    recorder.flush()
    is_cause = not is_transport_error(error)
    if is_cause or not _wait_for_other_error(recorder.folder, world.rank):
        failure_files.write_failure(
            recorder.folder, failure_files.make_failure(world.rank, error, recorder.current_step, is_cause)
        )
        if not is_cause:
            time.sleep(_TURN_SECONDS * world.rank)
        if failure_files.create_marker(recorder.folder, failure_files.REPORTED):
            report(world, error, is_cause)
            world.abort(1)
    time.sleep(_ABORT_SECONDS)  # the rank that reports usually ends this one, too
    world.abort(1)


def another_rank_failed(recorder: FlightRecorder) -> bool:
    """Return whether another rank has failed: a signal then comes from the launcher, not from the user."""
    folder = recorder.folder
    return failure_files.has_marker(folder, failure_files.REPORTED) or bool(failure_files.read_failures(folder))


def refuse(world: World, error: HvdlmError, prefix: str) -> None:
    """Report ``error``, an input error, once among all ranks, and end them with code 2."""
    recorder = world.recorder
    recorder.failing = True
    recorder.flush()
    failure_files.write_failure(
        recorder.folder, failure_files.make_failure(world.rank, error, recorder.current_step, is_cause=True)
    )
    if failure_files.create_marker(recorder.folder, failure_files.REPORTED):
        failure_files.report(recorder.folder, f"{prefix}{error}")
    else:
        time.sleep(_ABORT_SECONDS)
    world.abort(2)


def refuse_unconnected(error: HvdlmError, prefix: str) -> None:
    """Report ``error`` from before ranks were connected, to ranks that wait for this one, too; end those reached."""
    folder = process.attempt if process.size > 1 else None
    failure = replace(failure_files.make_failure(process.rank, error, 0, is_cause=True), code=BAD_INPUT)
    failure_files.write_failure(folder, failure)
    if failure_files.create_marker(folder, failure_files.REPORTED):
        failure_files.report(folder, f"{prefix}{error}")
    if process.size > 1:
        process.abort(BAD_INPUT)


def _wait_for_other_error(folder: Path | None, rank: int) -> bool:
    """Return whether another rank failed by itself, after waiting a moment for its error."""

    def has_cause() -> bool:
        return any(failure.is_cause for r, failure in failure_files.read_failures(folder).items() if r != rank)

    return folder is not None and failure_files.wait_for(has_cause, _ERROR_SECONDS)


def report(world: World, error: BaseException, is_cause: bool) -> None:
    """Print the error that ended this rank, for an error of the transport with what the flight recorders show."""
    if is_cause and not isinstance(error, (RankError, HvdlmError)):
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    failure: Failure = failure_files.make_failure(world.rank, error, world.recorder.current_step, is_cause)
    text = f"hvdlm: rank {world.rank} failed: {failure.message}"
    if not is_cause and world.recorder.folder is not None:
        folder = world.recorder.folder
        lines = failure_files.within(_EXPLAIN_SECONDS, lambda: diagnosis().explain_refused(folder, time.time()), [])
        text = "\n".join([text, *lines])
    failure_files.report(world.recorder.folder, text)
