"""Folders of pretrained models from which a run starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.config import Config
    from hvdlm.models.spec import ModelSpec


class UnavailableModel(HvdlmError):
    """A model that ``model.pretrained`` names, and that can't be had now; a run that is resumed may do without it."""


class PretrainedFolder(Protocol):
    """A folder with the weights of a trained model, from which a run starts (``model.pretrained``)."""

    def resolve(self, config: Config) -> Config:
        """Return a copy of ``config`` with the model's sizes, and its tokenizer unless another one is chosen.

        Raises:
            HvdlmError: ``config`` contradicts the folder.
        """

    def attach(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` whose parameters, or whose frozen ones if it has any, read their values from the folder.

        Sets ``ParamSpec.source``; a rank reads only the boxes that it holds, when it asks for them.

        Raises:
            HvdlmError: a parameter is missing or has another shape.
        """

    def fingerprint(self) -> str:
        """Return a hash of the weights, independent of the folder's path."""
