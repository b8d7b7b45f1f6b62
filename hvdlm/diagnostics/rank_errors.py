"""Ends all ranks when one of them fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.protocols.world import World


class ConnectedError(HvdlmError):
    """Bad input that was noticed after ranks were connected. ``world``: the ranks, all of which have to end."""

    def __init__(self, message: str, world: World) -> None:
        super().__init__(message)
        self.world = world


@contextmanager
def ending_all_ranks(world: World) -> Iterator[None]:
    """End all ranks of ``world`` where the block raises on this one, and report the error once; close it otherwise.

    Raises:
        ConnectedError: in place of an HvdlmError, which the command line reports.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"hvdlm: rank {world.rank}: interrupted", file=sys.stderr, flush=True)
        world.abort(130)
    except HvdlmError as error:
        raise ConnectedError(str(error), world) from error
    except Exception as error:
        from hvdlm.diagnostics import abort

        abort.end(world, error)
    end_together(world)
    world.close()


def end_together(world: World) -> None:
    """Wait for the other ranks, and delete the files of this one. All ranks call."""
    with process.during("waiting for the other ranks to end", patience=2.0, waits=True):
        world.gather_objects(None)  # a rank that is missing is named; a transport that shuts down would only wait
    process.discard()
