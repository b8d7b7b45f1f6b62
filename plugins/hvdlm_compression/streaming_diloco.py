"""Streaming DiLoCo: synchronisation of one fragment after the other, hidden behind steps (Douillard et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks, plugin
from hvdlm_compression.diloco import OUTER_LEARNING_RATE, OUTER_MOMENTUM

NAME = "streaming_diloco"


@hookimpl
def hvdlm_check(config: Config, spec: Any) -> None:
    """Refuse combinations of options that replicas which never agree do not support."""
    checks.check_streaming(config, spec)


@hookimpl
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
) -> Any:
    """Return the exchange named ``streaming_diloco``."""
    if name != NAME:
        return None
    return plugin.make_outer(
        "streaming.StreamingExchange", group, config, compressors, index, OUTER_LEARNING_RATE, OUTER_MOMENTUM
    )
