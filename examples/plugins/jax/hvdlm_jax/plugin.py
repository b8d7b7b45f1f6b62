"""The entry point of the framework ``jax``, which is imported only when it is used."""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import replace
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.framework import Probe
from hvdlm.protocols.types import Prediction

_VERSION = "0.10"  # as in pyproject.toml
_INSTALL = f"pip install 'jax=={_VERSION}.*'"
_CODE = "import jax; report(version=jax.__version__, gpus=0)"


@hookimpl
def hvdlm_probes() -> dict[str, Probe]:
    """Return how ``python -m hvdlm doctor`` examines JAX."""
    return {"jax": Probe(_CODE, _INSTALL)}


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Set what JAX and Keras (for compressors) read from the environment when they are imported."""
    if config.framework == "jax":
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"  # another is refused below
        if config.train.threads:
            os.environ["NPROC"] = str(config.train.threads)  # the size of XLA's thread pool


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Refuse to run without JAX, and the settings that this framework does not implement."""
    if config.framework != "jax":
        return
    _check_installation()
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
    check_precision(config)
    if config.train.groups or config.train.optimizer == "muon":
        option = "train.groups" if config.train.groups else "train.optimizer muon"
        raise HvdlmError(
            f"{option}: framework jax has adamw, sgd and adagrad, with one learning rate for all parameters: leave it "
            "out, or --framework torch."
        )
    if config.train.ema is not None:
        raise HvdlmError(
            "train.ema: framework jax keeps no average of its weights: leave it out, or --framework torch."
        )
    if config.train.compile is False:
        raise HvdlmError("framework jax compiles every step: leave out train.compile, or --framework torch.")


def _check_installation() -> None:
    """Refuse, without importing it, a JAX that is missing, of another version, or told to use another device."""
    try:
        jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    except importlib.metadata.PackageNotFoundError as error:
        raise HvdlmError(f"{error.name} is not installed here: {_INSTALL}, or --framework torch.") from None
    numbers, others = (list(map(int, re.findall(r"\d+", version)[:3])) for version in (jax, jaxlib))
    if not jax.startswith(f"{_VERSION}.") or others > numbers:
        raise HvdlmError(
            f"framework jax needs jax {_VERSION} and a jaxlib that is not newer, installed are {jax} and {jaxlib}: "
            f"{_INSTALL}."
        )
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms not in (None, "", "cpu"):
        raise HvdlmError(f"JAX_PLATFORMS={platforms}: framework jax trains on CPUs: unset it, or --framework torch.")


@hookimpl
def hvdlm_predict(config: Config, spec: ModelSpec, mesh: Mesh, rank: int, moments: int) -> Prediction | None:
    """Return the costs of a step with JAX: ZeRO-2 holds the gradients of a whole micro-batch, as ZeRO-1 does."""
    if config.framework != "jax":
        return None
    from hvdlm.planning.closed_forms import closed_form

    prediction = closed_form(config, spec, mesh, rank, moments=moments)
    whole = replace(config, parallel=replace(config.parallel, zero=min(config.parallel.zero, 1)))
    held = closed_form(whole, spec, mesh, rank, moments=moments)
    return prediction and held and replace(prediction, memory=held.memory)


def check_precision(config: Config) -> None:
    """Refuse a precision that was asked for, or that a checkpoint of another framework was trained in."""
    if config.train.precision not in ("auto", "fp32"):
        raise HvdlmError(
            f"framework jax computes in fp32, not in {config.train.precision}: --train.precision fp32, or --framework "
            "torch."
        )


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework named ``jax``."""
    if name != "jax":
        return None
    from hvdlm_jax.framework import Framework

    return Framework()
