"""hvdlm trains language models on MPI clusters, with Horovod, in PyTorch and TensorFlow alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdlm.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    """Import ``hookimpl`` when it is asked for: ``make setup`` uses ``hvdlm.io`` before anything is installed."""
    if name == "hookimpl":
        from hvdlm.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module 'hvdlm' has no attribute {name!r}")
