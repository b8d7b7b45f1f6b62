"""Local SGD: parameters are averaged every H steps (Stich 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import plugin, settings


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse settings that don't fit together."""
    settings.check_rounds(config)


@hookimpl
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Answer to ``local_sgd``."""
    return plugin.make_local(name, group, config, compressors, index) if name == "local_sgd" else None
