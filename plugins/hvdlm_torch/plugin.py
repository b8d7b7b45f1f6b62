"""The entry point of the framework ``torch``, which is imported only when it is used."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Choose this framework as the backend of keras (compressors, custom modules), which reads the choice at import."""
    if config.framework == "torch":
        os.environ["KERAS_BACKEND"] = "torch"


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework named ``torch``."""
    if name != "torch":
        return None
    from hvdlm_torch.framework import Framework

    return Framework()
