"""The state of a training run on one rank, under global names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.config import TrainConfig
    from hvdlm.parallel.flat_layout import Shard
    from hvdlm.protocols.optimizer import Optimizer


OPTIMIZER_STATE: dict[str, tuple[str, ...]] = {
    "adamw": ("first_moment", "second_moment"),
    "sgd": ("momentum",),
    "adagrad": ("sum_of_squares",),
    "muon": ("momentum", "first_moment", "second_moment"),
}
"""The kinds of state of each ``train.optimizer`` by their names in checkpoints, the same in every framework.

Of every parameter, float32 of its shape (Muon: the momentum of those that it orthogonalizes, AdamW's of all others):
AdamW's running means of the gradient and of its square (without correction of
their bias), SGD's velocity (the sum of gradients, not of updates), and Adagrad's sum of squared gradients.
"""


FIRST_STEP = "optimizer/first_step"
"""The entry of the step in whose update the optimizer's state was zero, if that wasn't the run's first one.

It was another optimizer's run before: bias is corrected by the number of updates since then. A scalar, float64.
"""


def optimizer_state(config: TrainConfig, own: Optimizer | None = None) -> tuple[str, ...]:
    """Return the kinds of state that the configured optimizer keeps: SGD without momentum keeps none.

    ``own``: the optimizer of a plugin, which names its own.
    """
    if own is not None:
        return own.state
    return () if config.optimizer == "sgd" and not config.momentum_value else OPTIMIZER_STATE[config.optimizer]


class StateDict(Protocol):
    """State that checkpoints save and restore, in any framework and layout."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of everything that training resumes from, under global names.

        ``parameters/NAME`` as in the ModelSpec, ``optimizer/KIND/NAME`` of the parameter's shape for every KIND of
        ``optimizer_state``, ``exchange/...`` of the exchange's state, and ``carry/...`` of recurrent models.
        """

    def shards(self) -> dict[str, Shard]:
        """Return which shard of the global array every entry of ``state()`` is; ``exchange/`` entries have none."""

    def replicas(self, names: Collection[str]) -> dict[str, str]:
        """Return the identities of those entries of ``state()``, by name, that other ranks may hold too.

        Ranks with the same identity of a name have to hold equal arrays now. Frozen base weights are included, as
        ``frozen/NAME``.
        """

    def frozen(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name, ``frozen/NAME``, and the present values of every frozen base weight; any thread may call."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``state()`` returned, perhaps in the other framework or on another number of ranks.

        Missing ``optimizer/``, ``exchange/`` and ``carry/`` entries start from their initial values.
        """
