"""Local SGD: parameters are averaged every H steps (Stich 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks, plugin

# With these, the outer optimizer sets the parameters to the ranks' mean.
OUTER_LEARNING_RATE = 1.0
OUTER_MOMENTUM = 0.0


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse combinations of options that infrequent synchronisation does not support."""
    checks.check_rounds(config)


@hookimpl
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Return the exchange named ``local_sgd``."""
    if name != "local_sgd":
        return None
    return plugin.make_outer(
        "local.LocalExchange", group, config, compressors, index, OUTER_LEARNING_RATE, OUTER_MOMENTUM
    )
