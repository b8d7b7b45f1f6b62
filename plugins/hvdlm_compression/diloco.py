"""DiLoCo: an outer optimizer applies the ranks' mean parameter difference every H steps (Douillard et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks, plugin

# The paper trains 8 ranks with momentum 0.9. With 2 ranks their mean difference is larger, and 0.8 ends at a lower loss
# (docs/compression.md).
OUTER_LEARNING_RATE = 0.7
OUTER_MOMENTUM = 0.8


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse combinations of options that infrequent synchronisation does not support."""
    checks.check_rounds(config)


@hookimpl
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Return the exchange named ``diloco``."""
    if name != "diloco":
        return None
    return plugin.make_outer(
        "local.LocalExchange", group, config, compressors, index, OUTER_LEARNING_RATE, OUTER_MOMENTUM
    )
