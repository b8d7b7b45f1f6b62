"""Entry points of exchanges that compress an optimizer's momentum in place of gradients: 1-bit and 0/1 Adam, DeMo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.compressor import CompressorMaker
from hvdlm.protocols.group import Group
from hvdlm_compression import checks, plugin


class Updates:
    """The plugin of one exchange of updates.

    ``make(group, config)`` returns the exchange, ``more`` refuse configurations that it doesn't support.
    """

    def __init__(self, name: str, make: Callable[[Group, Config], Any], *more: Callable[[Config], None]) -> None:
        self._name = name
        self._make = make
        self._checks = more

    @hookimpl
    def hvdlm_check(self, config: Config, spec: Any) -> None:
        """Refuse combinations of options that an exchange of updates does not support."""
        if config.communication.exchange == self._name:
            checks.check_updates(config, spec)
            for check in self._checks:
                check(config)

    @hookimpl
    def hvdlm_make_exchange(
        self, name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], index: int
    ) -> Any:
        """Return the exchange of this name."""
        return self._make(group, config) if name == self._name else None


def _one_bit_adam(group: Group, config: Config) -> Any:
    return plugin.imported("one_bit_adam").OneBitAdam(group, config.train, config.communication)


def _zero_one_adam(group: Group, config: Config) -> Any:
    return plugin.imported("zero_one_adam").ZeroOneAdam(group, config.train, config.communication)


def _demo(group: Group, config: Config) -> Any:
    options = config.communication
    rule = plugin.imported("demo").DecoupledMomentum(options.compression, len(group.ranks))
    return plugin.imported("updates").UpdateExchange(group, rule, options)


ONE_BIT_ADAM = Updates("one_bit_adam", _one_bit_adam)
ZERO_ONE_ADAM = Updates("zero_one_adam", _zero_one_adam, checks.check_rounds, checks.check_rates)
DEMO = Updates("demo", _demo)
