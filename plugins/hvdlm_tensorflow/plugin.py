"""The entry point: answers to ``tensorflow`` and only then imports it."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework when it is asked for."""
    if name != "tensorflow":
        return None
    # Its notes about oneDNN, CPU instructions and absent GPUs tell a user nothing; errors still come.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # keras, on which compression is written, reads this once.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    from hvdlm_tensorflow.framework import TensorFlowFramework

    return TensorFlowFramework()
