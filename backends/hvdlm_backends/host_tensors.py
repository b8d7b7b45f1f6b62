"""Tensors that are arrays: how a framework that brings no ``HostTensors`` of its own communicates by arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdlm.protocols.framework import Framework, HostCollective, HostTensors
from hvdlm.protocols.group import Handle
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

    def together(self, tensors: Sequence[Any], collective: HostCollective) -> Handle:
        """Start ``collective`` on the values of all ``tensors``; see ``interfaces.HostTensors``."""
        arrays = [np.asarray(tensor) for tensor in tensors]
        handle = collective(np.concatenate([array.reshape(-1) for array in arrays]), None)
        ends = np.cumsum([array.size for array in arrays])[:-1]

        def wait() -> list[Any]:
            parts = np.split(handle.wait(), ends)
            return [self._framework.tensor(p.reshape(a.shape)) for p, a in zip(parts, arrays, strict=True)]

        return Later(wait)


def host_tensors(framework: Framework) -> HostTensors:
    """Return how this framework's tensors travel through host memory."""
    return getattr(framework, "host_tensors", None) or ArrayTensors(framework)
