"""The state of a training run on one rank, under global names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.parallel.flat_layout import Shard


class StateDict(Protocol):
    """State that checkpoints save and restore, in any framework and layout."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of everything that training resumes from, under global names.

        ``parameters/NAME`` as in the ModelSpec, ``optimizer/KIND/NAME`` of the parameter's shape, ``exchange/...``,
        and ``carry/...`` of recurrent models.
        """

    def shards(self) -> dict[str, Shard]:
        """Return which shard of the global array every entry of ``state()`` is; ``exchange/`` entries have none."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state()`` returned, perhaps in the other framework or on another number of ranks.

        Missing ``optimizer/``, ``exchange/`` and ``carry/`` entries start from their initial values.
        """
