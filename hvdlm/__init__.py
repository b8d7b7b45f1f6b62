"""hvdlm trains language models on MPI clusters, with Horovod, in PyTorch and TensorFlow alike.

In Python: ``Config``, ``train`` and ``load``; for plugins: ``hookimpl``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdlm.config import Config
    from hvdlm.errors import HvdlmError, RankError
    from hvdlm.hookspecs import hookimpl
    from hvdlm_api.loaded_run import TrainedRun, load
    from hvdlm_api.training import Result, train

__version__ = "0.1.0"
__all__ = [
    "Config", "HvdlmError", "RankError", "Result", "TrainedRun", "__version__", "hookimpl", "load", "train",
]  # fmt: skip
_MODULES = {
    "Config": "hvdlm.config",
    "HvdlmError": "hvdlm.errors",
    "RankError": "hvdlm.errors",
    "Result": "hvdlm_api.training",
    "TrainedRun": "hvdlm_api.loaded_run",
    "hookimpl": "hvdlm.hookspecs",
    "load": "hvdlm_api.loaded_run",
    "train": "hvdlm_api.training",
}


if not TYPE_CHECKING:  # type checkers would take every misspelled name for an Any

    def __getattr__(name: str) -> Any:
        """Import what is used only then: ``--help`` stays fast, and ``make setup`` uses ``hvdlm.io`` uninstalled."""
        if name in _MODULES:
            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module 'hvdlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the Python API, for completion in a notebook."""
    return sorted(__all__)
