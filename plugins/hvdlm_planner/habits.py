"""What frameworks compute, compile or communicate in another way than PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.config import Config

if TYPE_CHECKING:
    from hvdlm.planning.closed_forms import Habits


def habits_of(config: Config) -> Habits:
    """Return the habits of the configured framework."""
    from hvdlm.planning.closed_forms import Habits

    torch = config.framework == "torch"
    return Habits(recomputes_all=config.framework == "tensorflow", compiles=torch)
