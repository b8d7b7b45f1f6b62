"""Exceptions of the Python API: raised where every rank has one, since the others could not continue otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvdlm.diagnostics import abort, failure_files
from hvdlm.diagnostics.failure_files import Failure
from hvdlm.diagnostics.rank_errors import end_together
from hvdlm.io import rank_context
from hvdlm.protocols.world import World

_ERROR_SECONDS = 3.0  # waited for the errors of the other ranks


@contextmanager
def raising_on_all_ranks(world: World, closes: bool = True) -> Iterator[None]:
    """Let an exception out of the block where every rank raises one; end all ranks where only some do.

    ``closes``: close the world after an exception, which is of no more use.
    """
    try:
        yield
    except BaseException as error:
        if rank_context.current():
            raise  # to the thread that started the ranks, which ends the others
        if world.size > 1:
            if not _fails_on_all_ranks(world, error):
                abort.end(world, error)
        end_together(world)
        if closes:
            world.close()
        raise
    end_together(world)


def _fails_on_all_ranks(world: World, error: BaseException) -> bool:
    """Return whether every rank fails at the same step, as all do where a loss isn't finite; waits a moment for them.

    They are then between the same two collectives, so that their callers may continue after the exception.
    """
    recorder = world.recorder
    if abort.is_transport_error(error) or not isinstance(error, Exception) or recorder.folder is None:
        return False
    failure = failure_files.make_failure(world.rank, error, recorder.current_step, is_cause=True)
    failure_files.write_failure(recorder.folder, failure)

    def failures() -> list[Failure]:
        return list(failure_files.read_failures(recorder.folder).values())

    if not failure_files.wait_for(lambda: len(failures()) == world.size, _ERROR_SECONDS):
        return False
    return all(other.is_cause and other.step == failure.step for other in failures())
