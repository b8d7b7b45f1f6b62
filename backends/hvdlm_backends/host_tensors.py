"""Tensors that are arrays: how a framework that brings no ``HostTensors`` of its own communicates by arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdlm.interfaces import Framework, Handle, HostCollective, HostTensors
from hvdlm_backends.messages import Later


class ArrayTensors:
    """Reads tensors by ``numpy.asarray``, and makes them by ``Framework.tensor``."""

    def __init__(self, framework: Framework) -> None:
        self._framework = framework

    def through(self, tensor: Any, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``; see ``interfaces.HostTensors``."""
        array = np.asarray(tensor, order="C")
        handle = collective(array, None)

        def wait() -> Any:
            result = handle.wait()
            overwritten = result is array and np.may_share_memory(array, tensor)
            return tensor if overwritten else self._framework.tensor(result)

        return Later(wait)

    def flatten(self, tensors: Sequence[Any]) -> Any:
        """Return tensors of one dtype as one; see ``interfaces.HostTensors``."""
        return self._framework.tensor(np.concatenate([np.asarray(tensor).reshape(-1) for tensor in tensors]))

    def unflatten(self, flat: Any, like: Sequence[Any]) -> list[Any]:
        """Return ``flat`` as tensors of the shapes of ``like``; see ``interfaces.HostTensors``."""
        array, start, found = np.asarray(flat), 0, []
        for tensor in like:
            shape = np.shape(tensor)
            stop = start + int(np.prod(shape, dtype=np.int64))
            found.append(self._framework.tensor(array[start:stop].reshape(shape)))
            start = stop
        return found


def host_tensors(framework: Framework) -> HostTensors:
    """Return how this framework's tensors travel through host memory."""
    return getattr(framework, "host_tensors", None) or ArrayTensors(framework)
