"""What a call of the Python API leaves as the program had it: environment variables, random numbers, memory."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from hvdlm.io import launcher_env, rank_context

T = TypeVar("T")


@contextmanager
def preserved(make: Callable[[], T]) -> Iterator[T]:
    """Yield what ``make`` makes, such as a plan; undo at the end of the block what it changed in the environment.

    What libraries set when they are imported stays. The random states of Python and numpy are those of before, too. Of
    ranks that are threads, the thread that started them restores both.
    """
    if rank_context.current():
        yield make()
        return
    before, changed = dict(os.environ), set()
    states = random.getstate(), np.random.get_state()
    try:
        try:
            made = make()
        finally:
            changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
        yield made
    finally:
        # Horovod's own settings are compared with those of the next call, since it starts once in a process.
        starts_once = launcher_env.launch_shape()[1] > 1
        for name in changed:
            if name in before:
                os.environ[name] = before[name]
            elif not (starts_once and name.startswith("HOROVOD_")):
                os.environ.pop(name, None)
        random.setstate(states[0])
        np.random.set_state(states[1])


def collect() -> None:
    """Free the model of a call that has ended, on a GPU, too: its parts refer to each other."""
    gc.collect()
