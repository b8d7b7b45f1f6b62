"""Connecting ranks without a run, for measurements."""

from __future__ import annotations

from hvdlm.config import Config
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.world import World
from hvdlm.training.run import connect_ranks, keep_recorder, plan, share_phases


def connect_only(config: Config) -> tuple[World, Framework]:
    """Connect the ranks as a run with ``config`` would, without data or a model, for measurements. All ranks call."""
    checked = plan(config, writes=False)
    share_phases(checked)
    framework, world = connect_ranks(checked)
    keep_recorder(checked, world)
    return world, framework
