"""The entry point of the framework ``tensorflow``, which is imported only when it is used."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.plugins import keras_alone


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Choose this framework as the backend of keras (compressors, custom modules), which reads the choice at import."""
    if config.framework == "tensorflow":
        os.environ["KERAS_BACKEND"] = "tensorflow"
        # Hides notes about oneDNN, CPU instructions and absent GPUs, which don't help a user; errors are still shown.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework named ``tensorflow``."""
    if name != "tensorflow":
        return None
    with keras_alone():
        from hvdlm_tensorflow.framework import Framework

    return Framework()
