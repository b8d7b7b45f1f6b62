"""Why the search prefers a layout: what each of its options gains, and what the memory rules out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hvdlm.config import Config
from hvdlm.planning.search import Costs, Layout, Space, search, value_of

if TYPE_CHECKING:
    from hvdlm.planning.step_time import StepTime

PLAIN = {
    "parallel.pipeline": 1,
    "parallel.tensor": 1,
    "parallel.sequence": False,
    "parallel.zero": 0,
    "train.activation_checkpointing": False,
    "communication.exchange": "all_reduce",
    "communication.compression.algorithm": "none",
}
"""The values without which a layout is compared; of other options, the given configuration's."""

CAUSES = ("compute", "communication", "bubble", "data", "save")


@dataclass(frozen=True)
class Gain:
    """What one option of a layout gains.

    Attributes:
        option: its full name.
        value: in the layout; ``plain``: the value that it is compared with.
        without: the fastest layout with ``plain``; None: none of them fits.
    """

    option: str
    value: Any
    plain: Any
    without: Layout | None


def gains(config: Config, space: Space, costs: Costs, best: Layout) -> list[Gain]:
    """Return what the options of ``best``, the first of the search's results, gain; fixed options are left out."""
    result = []
    for option, value in best.options.items():
        plain = PLAIN.get(option, value_of(config, option))
        restricted = _with_plain(space, option, plain)
        if value != plain and restricted is not None:
            without = search(config, restricted, costs, count=1)
            result.append(Gain(option, value, plain, without[0] if without else None))
    return result


def _with_plain(space: Space, option: str, plain: Any) -> Space | None:
    """Return the space in which an option has its plain value; None where that isn't searched."""
    if option == "train.micro_batch_size":
        return replace(space, micro_batches=False) if space.micro_batches else None
    if plain not in space.choices.get(option, ()):
        return None
    return space.only(option, plain)


def too_large(config: Config, space: Space, costs: Costs, best: Layout | None) -> Layout | None:
    """Return the fastest layout of all if it doesn't fit the memory: what ``best`` is slower than."""
    fastest = search(config, space, costs, count=1, limited=False)
    return fastest[0] if fastest and (best is None or fastest[0].options != best.options) else None


def largest_difference(slower: StepTime, faster: StepTime) -> tuple[str, float, float]:
    """Return the cause of which ``faster`` saves most, and its seconds in both."""
    cause = max(CAUSES, key=lambda name: getattr(slower, name) - getattr(faster, name))
    return cause, getattr(slower, cause), getattr(faster, cause)
