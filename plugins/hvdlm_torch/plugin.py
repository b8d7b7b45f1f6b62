"""The entry point: answers to ``torch`` and only then imports it."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl


@hookimpl
def hvdlm_make_framework(name: str) -> Any:
    """Return the framework when it is asked for."""
    if name != "torch":
        return None
    # keras, on which compression is written, reads this once.
    os.environ["KERAS_BACKEND"] = "torch"
    from hvdlm_torch.framework import TorchFramework

    return TorchFramework()
