"""The class of a model in a framework: one rank's shard of an architecture, on the framework's tensors.

A framework calls it; the core never does. It is found by ``ModelSpec.kind`` or by ``ModelSpec.implementations``, and
made as ``architecture(settings, model_shard, collectives)``: the settings of the description, the layers, columns and
rows that this rank computes (``hvdlm.parallel.sharding_rules.ModelShard``), and the framework's collectives within
layers. ``models.base.ModelBase`` of a framework implements all but ``hidden``. Further arguments (``extra``) are the
framework's own: PyTorch passes the device, TensorFlow the seed of dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hvdlm.protocols.types import Tensor

if TYPE_CHECKING:
    import numpy as np


class Layers(Protocol):
    """The forward pass."""

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        """Use these tensors as parameters, by their names in the description; called once, or for every graph."""

    def hidden(
        self, tokens: Tensor, x: Any, carry: Any, training: bool, *args: Any, **extra: Any
    ) -> tuple[Tensor, Any]:
        """Return the states of the last layer and the carried state, from tokens int32 ``[rows, time]``.

        ``x``: the activations ``[rows, time, width]`` of the stage before; in the first stage the batch's features by
        name, None without. Those of position t depend on tokens up to t only. ``args``: whether to recompute
        activations in the backward pass, and what the framework adds.
        """

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., vocab / tensor ranks]`` from the last layer's states ``[..., width]``."""


class Carries(Protocol):
    """The state that a recurrent model carries from batch to batch; of others, None and empty dictionaries."""

    def initial_carry(self, rows: int, *args: Any, **extra: Any) -> Any:
        """Return the state at the start of a text."""

    def carry_arrays(self, carry: Any) -> dict[str, np.ndarray]:
        """Return {``LAYER.NUMBER``: float32 ``[rows, width]``}, for checkpoints (``carry/LAYER.NUMBER``)."""

    def carry_tensors(self, arrays: Mapping[str, np.ndarray], micro_rows: int | None, *args: Any, **extra: Any) -> Any:
        """Return the states of all micro-batches of ``micro_rows`` rows from ``carry_arrays`` of all of them."""


class Decodes(Protocol):
    """Decoding token by token, with a cache of what earlier tokens have computed."""

    def cache(self, rows: int, *args: Any, **extra: Any) -> Any:
        """Return an empty cache."""

    def check_length(self, cache: Any, added: int) -> None:
        """Raise HvdlmError where the model can't read ``added`` more tokens."""

    def extend(self, tokens: Tensor, x: Any, cache: Any) -> tuple[Tensor, Any]:
        """Return the states of tokens that follow those in ``cache``, and the cache extended by them."""


@runtime_checkable
class JoinsCaches(Protocol):
    """A model whose caches can be joined. Optional: of others, only texts of the same length are generated together."""

    def join(self, caches: Sequence[Any], rows: Tensor) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``caches``, whose rows are numbered in turn.

        They may hold different numbers of tokens: ``extend`` then adds to every row after its own last token.
        """


class ReadsFeatures(Protocol):
    """Called only of models with ``ModelSpec.reads``: ``select`` by beam search, ``lengths`` by the CTC loss."""

    def read(self, x: Mapping[str, Tensor] | None) -> Any:
        """Encode the features; return the cache from which ``extend`` decodes."""

    def select(self, cache: Any, rows: Tensor) -> Any:
        """Return a cache whose row i is row ``rows[i]`` of ``cache``."""

    def lengths(self, x: Mapping[str, Tensor]) -> Tensor:
        """Return the number of frames of scores of every row."""


class Model(Layers, Carries, Decodes, ReadsFeatures, Protocol):
    """One rank's shard of a model."""
