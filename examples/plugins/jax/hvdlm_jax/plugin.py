"""The entry point of the framework ``jax``, which is imported only when it is used."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.framework import Probe

_CODE = "import jax; report(version=jax.__version__, gpus=0)"


@hookimpl
def hvdlm_probes() -> dict[str, Probe]:
    """Return how ``python -m hvdlm doctor`` examines JAX."""
    return {"jax": Probe(_CODE, "pip install 'jax>=0.10,<0.11'")}


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Set what JAX and Keras (for compressors) read from the environment when they are imported."""
    if config.framework == "jax":
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if config.train.threads:
            os.environ["NPROC"] = str(config.train.threads)  # the size of XLA's thread pool


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Refuse to run without JAX, and the settings that this framework does not implement."""
    if config.framework != "jax":
        return
    if importlib.util.find_spec("jax") is None:
        raise HvdlmError("framework jax is not installed here: pip install 'jax>=0.10,<0.11', or --framework torch.")
    if spec.kind not in ("gpt", "rnn") and "jax" not in spec.implementations:
        raise HvdlmError(
            f"model.name {config.model.name}: framework jax computes GPTs and recurrent models: choose one of them, or "
            "--framework torch."
        )
    if config.parallel.tensor * config.parallel.pipeline > 1:
        raise HvdlmError(
            "framework jax has data-parallel ranks only: leave parallel.tensor and parallel.pipeline at 1, or "
            "--framework torch."
        )
    if config.train.precision != "fp32":
        raise HvdlmError(
            f"framework jax computes in fp32, not in {config.train.precision}: leave train.precision at fp32, or "
            "--framework torch."
        )
    if config.train.compile is False:
        raise HvdlmError("framework jax compiles every step: leave out train.compile, or --framework torch.")


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework named ``jax``."""
    if name != "jax":
        return None
    from hvdlm_jax.framework import Framework

    return Framework()
