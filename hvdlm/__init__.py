"""hvdlm trains language models on MPI clusters, with Horovod, in PyTorch and TensorFlow alike."""

from hvdlm.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl"]
