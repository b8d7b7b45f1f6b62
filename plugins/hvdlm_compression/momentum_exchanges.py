"""Entry point of the exchanges that compress an optimizer's momentum in place of gradients: 1-bit Adam, DeMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks, plugin

NAMES = ("one_bit_adam", "demo")


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse combinations of options that an exchange of updates does not support."""
    if config.communication.exchange in NAMES:
        checks.check_updates(config)


@hookimpl
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Return the exchange named ``one_bit_adam`` or ``demo``."""
    options = config.communication
    if name == "one_bit_adam":
        return plugin.imported("one_bit_adam").OneBitAdam(group, config.train, options)
    if name == "demo":
        rule = plugin.imported("demo").DecoupledMomentum(options.compression, len(group.ranks))
        return plugin.imported("updates").UpdateExchange(group, rule, options)
    return None
