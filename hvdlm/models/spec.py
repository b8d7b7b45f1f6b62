"""Descriptions of models, independent of the framework: parameters, initial values, costs."""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hvdlm.errors import HvdlmError

Source = Callable[[int, tuple[slice, ...]], np.ndarray]
"""(seed, box of the global array) -> the float32 values of the box."""

_CHUNK = 1 << 20  # elements drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Init:
    """Initial values: ``normal`` (``scale``: standard deviation), ``uniform`` in +-scale, ``zeros`` or ``ones``."""

    kind: Literal["normal", "uniform", "zeros", "ones"]
    scale: float = 0.0


@dataclass(frozen=True)
class ParamSpec:
    """A parameter.

    Attributes:
        name: its global name, the same in every framework, layout and checkpoint.
        shape: its global shape. Matrices are ``[inputs, outputs]``: a layer computes ``x @ weight + bias``.
        axes: the logical axis of each dimension (``("embed", "heads")``), which sharding rules map to mesh axes.
        init: its initial values.
        decay: whether weight decay applies.
        source: returns the initial values, in place of ``init``.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool = False
    source: Source | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    def initial_box(self, seed: int, box: tuple[slice, ...]) -> np.ndarray:
        """Return the float32 initial values of ``box``, without computing much more than that."""
        if self.source:
            return self.source(seed, box)
        rows, columns = box[0], (slice(None), *box[1:])
        out = np.empty([s.stop - s.start for s in box], np.float32)
        step = max(1, _CHUNK * self.shape[0] // self.size)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            out[start - rows.start : stop - rows.start] = self.initial(seed, slice(start, stop))[columns]
        return out

    def initial(self, seed: int, rows: slice = slice(None)) -> np.ndarray:
        """Return the float32 initial values of ``rows`` along the first dimension, without computing the others.

        Element k of a parameter depends on (seed, name, k) only: the Philox counter (Salmon et al. 2011) is advanced to
        k, and normal values are the Box-Muller transform of the two halves of one 64-bit word.
        """
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("rows must be contiguous")
        inner = self.size // self.shape[0]
        shape = (last - first, *self.shape[1:])
        if self.source:
            return self.source(seed, (slice(first, last), *(slice(0, n) for n in self.shape[1:])))
        if self.init.kind in ("zeros", "ones"):
            return np.full(shape, 0.0 if self.init.kind == "zeros" else 1.0, np.float32)
        key = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()[:16]
        out = np.empty((last - first) * inner, np.float32)
        for start in range(0, out.size, _CHUNK):
            stop = min(start + _CHUNK, out.size)
            words = _words(key, first * inner + start, stop - start)
            uniform = ((words >> np.uint64(32)) + 0.5) / 2.0**32
            if self.init.kind == "uniform":
                out[start:stop] = (2.0 * uniform - 1.0) * self.init.scale
            else:
                angle = (words & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi / 2.0**32)
                out[start:stop] = np.sqrt(-2.0 * np.log(uniform)) * np.cos(angle) * self.init.scale
        return out.reshape(shape)


def _words(key: bytes, start: int, count: int) -> np.ndarray:
    """Return uint64 words ``start .. start + count`` of the Philox stream of a 128-bit key (4 a counter)."""
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(start // 4)
    skipped = start % 4
    return np.asarray(generator.random_raw(count + skipped))[skipped:]


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: ``factor`` x ``down`` @ ``up`` is added to the frozen ``weight``; names of parameters."""

    weight: str
    down: str
    up: str
    factor: float


@dataclass(frozen=True)
class ModelSpec:
    """The description of a model; its parameters are in the order of the forward pass.

    Attributes:
        kind: the architecture that a framework plugin implements (``gpt``, ``rnn``, ...).
        settings: the architecture's dataclass, with ``vocab``, ``layers``, ``width`` (recurrent models: ``carries``).
        params: the trained parameters.
        flops_per_token: multiplications and additions per token in training (forward and backward pass).
        loss: ``cross_entropy`` of every target, or ``ctc``: the negative log-probability of a row's targets, summed
            over alignments, with id 0 as the blank (Graves et al. 2006, eq. 8).
        reads: the features of a batch that it uses as input; empty: tokens only.
        implementations: of a plugin's kind: {framework: "module:Class"}, the class that implements it.
        frozen: the base model's parameters where only adapters are trained (``hvdlm.models.lora``).
        adapters: the adapters to them.
    """

    kind: str
    settings: Any
    params: tuple[ParamSpec, ...]
    flops_per_token: float
    loss: Literal["cross_entropy", "ctc"] = "cross_entropy"
    reads: tuple[str, ...] = ()
    implementations: Mapping[str, str] = field(default_factory=dict, compare=False)
    frozen: tuple[ParamSpec, ...] = ()
    adapters: tuple[Adapter, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of trained parameters (tied ones counted once)."""
        return sum(p.size for p in self.params)

    @property
    def frozen_parameters(self) -> int:
        """The number of frozen parameters."""
        return sum(p.size for p in self.frozen)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen parameters in float32; adapted ones are kept twice, with and without their adapters."""
        adapted = {adapter.weight for adapter in self.adapters}
        return 4 * sum(param.size * (2 if param.name in adapted else 1) for param in self.frozen)

    def initial(self, seed: int) -> dict[str, np.ndarray]:
        """Return {name: float32 initial values} of every parameter."""
        return {p.name: p.initial(seed) for p in self.params}

    def implementation(self, framework: str) -> Any:
        """Import and return the class that implements this kind in ``framework``.

        Raises:
            HvdlmError: there is none, or its module can't be imported.
        """
        if framework not in self.implementations:
            known = ", ".join(self.implementations) or "no framework"
            raise HvdlmError(
                f"the architecture {self.kind!r} has no implementation in {framework} (implemented in {known})."
            )
        path = self.implementations[framework]
        try:
            return pkgutil.resolve_name(path)
        except Exception as error:  # a third party's module may fail in any way
            raise HvdlmError(
                f"the architecture {self.kind!r} for {framework} ({path}) does not import: {type(error).__name__}: "
                f"{error}. Repair or uninstall its plugin."
            ) from error


ModelMaker = Callable[[Any, int, int], ModelSpec]
"""``maker(config: ModelConfig, vocab: int, context: int) -> ModelSpec``; what ``hvdlm_models`` collects by name."""
