"""Parameter groups (``train.groups``): the learning rate and weight decay of parameters by patterns of their names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hvdlm.config import TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import Elements

_LISTED = 200  # characters of the names in a sentence
_EXAMPLE = "--train.groups \"{'embed.*': {learning_rate_scale: 0.5, weight_decay: 0}}\""


@dataclass(frozen=True)
class Group:
    """The options of a group; None: those of ``train``.

    Attributes:
        learning_rate_scale: factor of the schedule's rate, at every step; 0: the parameters stay as they are.
        weight_decay: weight decay of all parameters of the group.
        muon: whether ``train.optimizer muon`` orthogonalizes their updates; None: those of hidden matrices.
    """

    learning_rate_scale: float = 1.0
    weight_decay: float | None = None
    muon: bool | None = None


@dataclass(frozen=True)
class UpdateRates:
    """What the update of every element depends on, float32 ``[n]`` in the order of the vector that is updated.

    Attributes:
        decays: weight decay.
        scales: factors of the learning rate; None: all are 1.
    """

    decays: np.ndarray
    scales: np.ndarray | None = None

    def of(self, elements: Sequence[Elements]) -> UpdateRates:
        """Return those of some elements of the vector, one after the other."""
        ranges = [slice(start, start + last - first) for _, start, (first, last) in elements]
        decays = np.concatenate([self.decays[one] for one in ranges])
        if self.scales is None:
            return UpdateRates(decays)
        return UpdateRates(decays, np.concatenate([self.scales[one] for one in ranges]))


class ParameterGroups:
    """The groups of ``train.groups``, in their order."""

    def __init__(self, options: TrainConfig) -> None:
        self._decay = options.weight_decay
        self._groups = {pattern: Group(**values) for pattern, values in (options.groups or {}).items()}

    def of(self, name: str) -> Group:
        """Return the first group with a pattern that matches the parameter's name, with or without ``.weight``."""
        return next((group for pattern, group in self._groups.items() if _matches(name, pattern)), Group())

    def weight_decay(self, name: str, decay: bool) -> float:
        """Return a parameter's weight decay; ``decay``: whether the model's description has any for it."""
        chosen = self.of(name).weight_decay
        return self._decay * decay if chosen is None else chosen

    def learning_rate_scale(self, name: str) -> float:
        """Return the factor of a parameter's learning rate."""
        return self.of(name).learning_rate_scale

    @property
    def scaled(self) -> bool:
        """Whether learning rates differ."""
        return any(group.learning_rate_scale != 1.0 for group in self._groups.values())


def check(options: TrainConfig, spec: ModelSpec) -> None:
    """Check ``train.groups``: its values, and that every pattern is the first to match some parameter.

    Raises:
        HvdlmError: the first problem.
    """
    taken: set[str] = set()
    names = [param.name for param in spec.params]
    matrices = {param.name for param in spec.params if len(param.shape) == 2}
    for pattern, values in (options.groups or {}).items():
        _check_values(pattern, values, options.optimizer)
        matched = {name for name in names if _matches(name, pattern)}
        if not matched:
            raise HvdlmError(
                f"train.groups: no parameter's name matches {shown(repr(pattern))}; there are {_listed(names)}."
            )
        if matched <= taken:
            raise HvdlmError(
                f"train.groups: all parameters that {shown(repr(pattern))} matches belong to groups before it, and the "
                "first that matches counts: write the more specific pattern first, or leave this one out."
            )
        if values.get("muon") and not matched <= matrices:
            raise HvdlmError(
                f"train.groups {shown(repr(pattern))}: muon orthogonalizes matrices, and "
                f"{min(matched - matrices)} is none: write a pattern that matches matrices only."
            )
        taken |= matched


def _check_values(pattern: Any, values: Any, optimizer: str) -> None:
    """Check the options of one group."""
    where = f"train.groups {shown(repr(pattern))}"
    if type(pattern) is not str:
        raise HvdlmError(f"{where}: expected a pattern of parameters' names: write {_EXAMPLE}.")
    if not isinstance(values, Mapping) or not values:
        raise HvdlmError(f"{where}: expected options of the group, got {shown(values)}: write {_EXAMPLE}.")
    for key, value in values.items():
        if key == "learning_rate":
            raise HvdlmError(
                f"{where}: all groups follow one schedule: write learning_rate_scale, a factor of train.learning_rate."
            )
        if key not in Group.__dataclass_fields__:
            known = ", ".join(Group.__dataclass_fields__)
            raise HvdlmError(f"{where}: there is no option {shown(repr(key))} of groups, which have {known}.")
        if key == "muon":
            if type(value) is not bool or optimizer != "muon":
                raise HvdlmError(
                    f"{where}: muon is {shown(value)}, with train.optimizer {optimizer}; expected true or false, with "
                    "--train.optimizer muon."
                )
        elif type(value) not in (int, float) or not 0 <= value < math.inf:
            raise HvdlmError(f"{where}: {key} is {shown(value)}, expected a number, 0 or more.")


def _listed(names: Sequence[str]) -> str:
    """Return the names for a sentence, the numbers of layers replaced by ``*``."""
    available = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", shown(name.removesuffix(".weight"))) for name in names))
    listed = available[:1]
    for name in available[1:]:
        if len(", ".join([*listed, name])) > _LISTED:
            return f"{', '.join(listed)} and {len(available) - len(listed)} more"
        listed.append(name)
    return ", ".join(listed)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
