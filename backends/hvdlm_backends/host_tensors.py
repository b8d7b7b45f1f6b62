"""Transfer of tensors through arrays, for frameworks that bring no ``HostTensors`` of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdlm.protocols.framework import Framework, HasHostTensors, HostCollective, HostTensors
from hvdlm.protocols.group import Handle
from hvdlm_backends.messages import FunctionHandle


class ArrayTensors:
    """Converts tensors with ``numpy.asarray`` and back with ``Framework.tensor``."""

    def __init__(self, framework: Framework) -> None:
        self._framework = framework

    def through(self, tensor: Any, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``."""
        array = np.asarray(tensor, order="C")
        handle = collective(array, None)

        def wait() -> Any:
            result = handle.wait()
            overwritten = result is array and np.may_share_memory(array, tensor)
            return tensor if overwritten else self._framework.tensor(result)

        return FunctionHandle(wait)

    def together(self, tensors: Sequence[Any], collective: HostCollective) -> Handle:
        """Start ``collective`` on the values of all ``tensors``."""
        arrays = [np.asarray(tensor) for tensor in tensors]
        handle = collective(np.concatenate([array.reshape(-1) for array in arrays]), None)
        ends = np.cumsum([array.size for array in arrays])[:-1]

        def wait() -> list[Any]:
            results = np.split(handle.wait(), ends)
            return [self._framework.tensor(r.reshape(a.shape)) for r, a in zip(results, arrays, strict=True)]

        return FunctionHandle(wait)


def host_tensors(framework: Framework) -> HostTensors:
    """Return the framework's own transfer through host memory, or the one through arrays."""
    return framework.host_tensors if isinstance(framework, HasHostTensors) else ArrayTensors(framework)
