"""Entry point of exact sums (``communication.reduction exact``), whose bits don't depend on the data ranks' number."""

from __future__ import annotations

import os
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.group import Group
from hvdlm_exact import checks
from hvdlm_exact.exchange import ExactExchange


@hookimpl
def hvdlm_prepare(config: Config) -> None:
    """Have cuBLAS compute in workspaces of a fixed size, without which its sums may differ from call to call."""
    if config.communication.reduction == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse what exact sums don't support."""
    if config.communication.reduction == "exact":
        checks.check(config)


@hookimpl(tryfirst=True)
def hvdlm_make_exchange(name: str, group: Group, config: Config, index: int) -> ExactExchange | None:
    """Return the exchange ``all_reduce`` where sums are to be exact; called before the core's own hook."""
    if name != "all_reduce" or config.communication.reduction != "exact":
        return None
    return ExactExchange(group, config, index)
