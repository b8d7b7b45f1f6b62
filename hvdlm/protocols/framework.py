"""Deep-learning frameworks, and their tensors in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.group import Handle
from hvdlm.protocols.optimizer import Optimizer
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Tensor
from hvdlm.protocols.world import World

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.config import Config
    from hvdlm.models.spec import ModelSpec
    from hvdlm.parallel.mesh import Mesh


@dataclass(frozen=True)
class Probe:
    """How ``python -m hvdlm doctor`` examines a framework.

    Attributes:
        code: Python code for a process of its own: imports the framework, calls ``report(version=..., gpus=...)``.
        install: how to install the framework.
        horovod: whether Horovod has operations for it, ``horovod.NAME``, which are examined too.
    """

    code: str
    install: str
    horovod: bool = False


@dataclass(frozen=True)
class Resolved:
    """What a rank computes with, where options leave it to the machine.

    Attributes:
        device: CPU, or what the driver calls the GPU, such as NVIDIA H100 80GB HBM3.
        identity: of a GPU, the same on ranks that share it, and on no others; ``""``: the host's processors.
        precision: what ``train.precision auto`` stands for on it.
        tf32: whether products in fp32 are computed in TF32.
        compile: whether steps are compiled; False also where ``train.compile true`` is impossible.
        notes: what else is to be printed beside these, such as the reason why steps are not compiled.
    """

    device: str = "CPU"
    identity: str = ""
    precision: str = "fp32"
    tf32: bool = False
    compile: bool = False
    notes: tuple[str, ...] = ()


@runtime_checkable
class ResolvesOptions(Protocol):
    """A framework that resolves ``auto``; others compute in fp32 and compile nothing."""

    def resolve(self, config: Config, spec: ModelSpec, world: World) -> Resolved:
        """Select this rank's device and return what it computes with. Once, before tensors are made. No communication.

        Raises:
            HvdlmError: this rank has no device, or it can't do what an option asks for.
        """


@runtime_checkable
class HasAbilities(Protocol):
    """A framework that has what others may lack; runs that ask for more than it has are refused.

    Attributes:
        abilities: those of ``groups`` (``train.groups``), ``muon`` (``train.optimizer muon``), ``ema`` (``train.ema``;
            its Trainables are ``HasMovingAverage``), ``zero3`` (``parallel.zero 3``), ``context_ranks``
            (``parallel.context``), ``document_masks`` (``data.document_masks``: its models read
            ``Batch.document_starts``) and ``activation_offload`` (``train.activation_offload``) that it has. Without
            this attribute it has none.
    """

    abilities: tuple[str, ...]


class HostCollective(Protocol):
    """A collective on a contiguous array in host memory."""

    def __call__(self, array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
        """Start the collective; its result is an array. ``arrived`` waits until ``array`` is filled (None: it is)."""


class HostTensors(Protocol):
    """Passes a framework's tensors through host memory, for transports that take only arrays (backend mpi4py)."""

    def through(self, tensor: Tensor, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``; the handle's result is a tensor.

        The array is contiguous and may share the tensor's memory; where ``Framework.in_place``, the collective may
        return the array itself, overwritten, and the result is then ``tensor``, overwritten. Inside a graph,
        collectives start in the order in which they were traced, and ``wait`` waits where it is traced. ``shape`` is
        that of the result, None where it isn't known before.
        """

    def together(self, tensors: Sequence[Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` (a sum) once, on the values of all ``tensors``, which are of one dtype.

        The handle's result is a list of tensors of the same shapes; ``tensors`` may be overwritten.
        """


@runtime_checkable
class HasHostTensors(Protocol):
    """A framework whose tensors are not arrays in host memory; those of others are read by ``numpy.asarray``."""

    host_tensors: HostTensors


class Framework(Protocol):
    """A deep-learning framework: builds Trainables from descriptions.

    Its tensors have ``shape``, ``dtype`` and ``nbytes``. Backend ``mpi4py`` reads them by ``numpy.asarray`` and makes
    them by ``tensor``, or asks ``HasHostTensors``; Horovod's backends need ``HasHorovod`` of hvdlm_backends.

    Attributes:
        name: the name that ``--framework`` takes, that of the plugin's entry point.
        in_place: whether a sum may overwrite the tensor that it is given; False where tensors are immutable.
    """

    name: str
    in_place: bool

    def build(
        self,
        model: ModelSpec,
        mesh: Mesh,
        world: World,
        exchange: Exchange,
        config: Config,
        optimizer: Optimizer | None = None,
    ) -> Trainable:
        """Return the model at its initial values (``ModelSpec.initial``), ready to train. No communication.

        ``config``: with ``auto`` resolved; where it is left, it stands for fp32, and for no compilation.
        ``optimizer``: a plugin's; None: the one of the framework that ``train.optimizer`` names.
        """

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return ``array``, of its dtype, on this rank's device; may share its memory."""
