"""The entry point of the framework ``tensorflow``, which is imported only when it is used."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import TYPE_CHECKING

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.plugins import keras_alone
from hvdlm.protocols import framework as protocols
from hvdlm.protocols.framework import Probe

if TYPE_CHECKING:
    from hvdlm.models.spec import ModelSpec
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.protocols.types import Prediction

_CODE = """
import tensorflow as tf
from importlib.metadata import version
report(version=f"{tf.__version__}, Keras {version('keras')}", gpus=len(tf.config.list_physical_devices("GPU")))
"""


@hookimpl
def hvdlm_probes() -> dict[str, Probe]:
    """Return how TensorFlow is examined."""
    install = "pip install 'hvdlm[tensorflow]', or in a checkout make setup FRAMEWORKS=\"tensorflow\""
    return {"tensorflow": Probe(_CODE, install, horovod=True)}


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Choose this framework as the backend of keras (compressors, custom modules), which reads the choice at import."""
    if config.framework == "tensorflow":
        os.environ["KERAS_BACKEND"] = "tensorflow"
        # Hides notes about oneDNN, CPU instructions and absent GPUs, which don't help a user; errors are still shown.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Check that TensorFlow is installed, what it can compile, and the precision of a Keras model.

    Raises:
        HvdlmError: it isn't or can't, or the model has a precision of its own.
    """
    if config.framework != "tensorflow":
        return
    if importlib.util.find_spec("tensorflow") is None:
        if sys.version_info >= (3, 14):
            version = platform.python_version()
            raise HvdlmError(f"framework tensorflow has no wheel for Python {version}: use 3.10 to 3.13, or torch.")
        raise HvdlmError(
            'framework tensorflow is not installed here: make setup FRAMEWORKS="tensorflow", or --framework torch.'
        )
    if config.parallel.zero == 3 and config.parallel.tensor > 1:
        raise HvdlmError(
            "parallel.zero 3: TensorFlow's tensor ranks can't gather weights layer by layer: --parallel.zero 2, "
            "--parallel.tensor 1, or --framework torch."
        )
    if config.train.compile is True and (reason := uncompilable(config, spec)):
        raise HvdlmError(f"train.compile: {reason}: leave it out, or keep parallel.tensor at 1.")
    if spec.kind == "own" and config.train.precision not in ("auto", "fp32"):
        raise HvdlmError(
            f"train.precision {config.train.precision}: Keras layers have a precision of their own: leave it fp32, and "
            "give the model's layers dtype='mixed_bfloat16'."
        )


def uncompilable(config: Config, spec: ModelSpec) -> str:
    """Return why steps of this run can't be compiled; ``""`` where they can."""
    if config.parallel.tensor == 1:
        return ""
    return "XLA can't compile the collectives of tensor ranks, which Horovod and MPI execute"


@hookimpl
def hvdlm_predict(config: Config, spec: ModelSpec, mesh: Mesh, rank: int, moments: int) -> Prediction | None:
    """Return the costs of a step with TensorFlow."""
    if config.framework != "tensorflow":
        return None
    from hvdlm.planning.closed_forms import Habits, closed_form

    habits = Habits(recomputes_all=True, gathers_in_graph=True, gathers_context=True)
    return closed_form(config, spec, mesh, rank, habits, moments)


@hookimpl
def hvdlm_make_framework(name: str) -> protocols.Framework | None:
    """Return the framework named ``tensorflow``."""
    if name != "tensorflow":
        return None
    with keras_alone():
        from hvdlm_tensorflow.framework import Framework

    return Framework()
