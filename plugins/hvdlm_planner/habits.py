"""What frameworks compute, compile or communicate in another way than PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.config import Config

if TYPE_CHECKING:
    from hvdlm.planning.closed_forms import Habits


def habits_of(config: Config) -> Habits:
    """Return the habits of the configured framework."""
    from hvdlm.planning.closed_forms import Habits

    graphs = config.framework == "tensorflow"
    return Habits(recomputes_all=graphs, compiles=config.framework == "torch", packs_gradients=graphs)
