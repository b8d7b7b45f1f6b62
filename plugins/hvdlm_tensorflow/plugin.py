"""The entry point: answers to ``tensorflow`` and only then imports it."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.plugins import keras_alone


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Have keras, on which compression and models of plugins' own are written, use this framework: it asks once."""
    if config.framework == "tensorflow":
        os.environ["KERAS_BACKEND"] = "tensorflow"
        # TensorFlow's notes about oneDNN, CPU instructions and absent GPUs tell a user nothing; errors still come.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework when it is asked for."""
    if name != "tensorflow":
        return None
    with keras_alone():
        from hvdlm_tensorflow.framework import TensorFlowFramework

    return TensorFlowFramework()
