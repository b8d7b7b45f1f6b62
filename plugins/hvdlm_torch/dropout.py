"""Dropout of one rank, whose masks come from a generator of its own: other ranks may be threads of this process.

The default generator, which belongs to the whole process, is used where PyTorch allows no other: by the fused kernels
of GPUs, by compiled code, and by the layers of a plugin's model. It then draws this rank's numbers for one forward
pass, while other ranks of the process wait.

Without a twin: TensorFlow's dropout takes its seed as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hvdlm_language.custom_module import PROCESS_RANDOM


class DropoutMasks:
    """The dropout masks of a rank on ``device``.

    Attributes:
        by_default_generator: whether PyTorch's default generator draws them.
    """

    def __init__(self, device: torch.device, by_default_generator: bool) -> None:
        self.by_default_generator = by_default_generator
        self._generator = torch.Generator()
        self._own = [self._generator]
        self._default = [torch.default_generator]
        if device.type == "cuda":
            self._own.append(torch.Generator(device))
            self._default.append(torch.cuda.default_generators[device.index])

    def seed(self, seed: int) -> None:
        """Begin a step, whose masks follow from ``seed`` (0 to 2**63 - 1)."""
        for generator in self._own:
            generator.manual_seed(seed)

    def drop(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        """Return ``x`` with the share ``rate`` of its elements set to zero, and the others divided by ``1 - rate``."""
        if self.by_default_generator:
            return F.dropout(x, rate)
        # As F.dropout computes it on a CPU, bit for bit.
        mask = torch.empty_like(x).bernoulli_(1.0 - rate, generator=self._generator)
        return x * mask.div_(1.0 - rate)

    def recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(*arguments)``, which the backward pass computes again, with the same masks."""
        if self.by_default_generator:
            return checkpoint(function, *arguments, use_reentrant=False)
        return checkpoint(
            function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=self._twice_the_same
        )

    def _twice_the_same(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a computation that begins now, and of its repetition."""
        return nullcontext(), self._drawing_from(self._generator.get_state())

    @contextmanager
    def _drawing_from(self, state: torch.Tensor) -> Iterator[None]:
        before = self._generator.get_state()
        self._generator.set_state(state)
        try:
            yield
        finally:
            self._generator.set_state(before)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Have the default generator draw this rank's numbers, if it draws any, and the program's again afterwards."""
        if not self.by_default_generator:
            yield
            return
        with PROCESS_RANDOM:
            program = [generator.get_state() for generator in self._default]
            _copy_states(self._own, self._default)
            try:
                yield
            finally:
                _copy_states(self._default, self._own)
                for generator, state in zip(self._default, program, strict=True):
                    generator.set_state(state)


def _copy_states(sources: list[torch.Generator], targets: list[torch.Generator]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.set_state(source.get_state())
