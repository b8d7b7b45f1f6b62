"""The entry point: answers to ``torch`` and only then imports it."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Have keras, on which compression and models of plugins' own are written, use this framework: it asks once."""
    if config.framework == "torch":
        os.environ["KERAS_BACKEND"] = "torch"


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework when it is asked for."""
    if name != "torch":
        return None
    from hvdlm_torch.framework import TorchFramework

    return TorchFramework()
