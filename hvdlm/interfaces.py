"""The contracts between the core and its plugins. Read this page before writing one.

Arrays that cross a contract are numpy arrays, so that neither side needs the other's framework; only a
``Group`` moves the active framework's own tensors, because that is what communication is about.

Shapes: ``rows`` counts sequences, ``time`` counts tokens in a sequence.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from hvdlm.config import CompressionConfig, Config
    from hvdlm.diagnostics.flight_recorder import FlightRecorder
    from hvdlm.models.spec import ModelSpec
    from hvdlm.parallel.flat_layout import FlatLayout, Shard
    from hvdlm.parallel.mesh import Mesh

Tensor = Any
"""A tensor of the active framework (torch.Tensor or tf.Tensor): the core never looks inside."""


class HvdlmError(Exception):
    """What the user did, or the machine lacks: one sentence with what, where and what to do. Exit code 2."""


class RankError(Exception):
    """A fault found while ranks were computing, with a sentence that names the rank. Exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence part that lists what is known, and first what is nearest to ``name``."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"Known: {', '.join(names)}."


@dataclass
class Batch:
    """One rank's rows of one batch.

    Attributes:
        inputs: int32 ``[rows, time]``, token ids.
        targets: int32 ``[rows, time]``, the next token at each position.
        weights: float32 ``[rows, time]``, 1 where the target counts, 0 where it is padding; None: all count.
        reset: whether a recurrent model starts this batch from its zero state.
        features: what the model reads beside tokens, by the names of its description, each ``[rows, ...]``.
        items: int64 ``[rows]``, which items of a task's own the rows are; models don't see them.
        corpus: of a validation batch, the corpus of a mixture it is of; its sums are then ``CORPUS/loss``, and so on.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None
    reset: bool = False
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    items: np.ndarray | None = None
    corpus: str = ""

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows ``start:stop`` as a batch of their own."""
        weights = None if self.weights is None else self.weights[start:stop]
        features = {name: array[start:stop] for name, array in self.features.items()}
        items = None if self.items is None else self.items[start:stop]
        arrays = self.inputs[start:stop], self.targets[start:stop], weights
        return Batch(*arrays, self.reset, features, items, self.corpus)

    @property
    def tokens(self) -> float:
        """How many targets count."""
        return float(self.targets.size if self.weights is None else self.weights.sum(dtype="float64"))


@dataclass
class StepResult:
    """What one optimizer step did. Seconds and bytes are this rank's, all else is the same on all ranks.

    Attributes:
        loss: mean loss over all valid tokens of the global batch, in nats, before the update.
        tokens: valid tokens in the global batch.
        grad_norm: global L2 norm of the averaged gradient before clipping.
        comm_seconds: time the step stood still for communication (what the backward pass did not hide).
        comm_bytes: bytes this rank handed to collectives.
        transfer_seconds: time that collectives took in the background, hidden or not; None: not known. The loop's.
        idle_seconds: time in which this rank waited for other pipeline stages' results (part of comm_seconds).
        axis_bytes: comm_bytes by the axis of the mesh along which they travelled (``exchange.AXIS_OF``).
        skipped: the update was left out, because the gradients were not finite or their norm above the limit.
    """

    loss: float
    tokens: float
    grad_norm: float
    comm_seconds: float = 0.0
    comm_bytes: int = 0
    transfer_seconds: float | None = None
    idle_seconds: float = 0.0
    axis_bytes: dict[str, int] = field(default_factory=dict)
    skipped: bool = False
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What closed forms say of one rank.

    Attributes:
        memory: bytes of parameters, gradients, optimizer and activations.
        bytes: bytes that a step hands to collectives, by axis (``exchange.AXIS_OF``); None: sums aren't dense.
        idle_share: share of a step in which a pipeline stage waits.
        layers: (first, last exclusive) of the layers that it computes.
        micro_batches: micro-batches of a step.
    """

    memory: dict[str, int]
    bytes: dict[str, int] | None
    idle_share: float
    layers: tuple[int, int]
    micro_batches: int


@dataclass
class Traffic:
    """What one kind of collective moved so far for one purpose: calls, bytes handed to the library, seconds waited."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Return the result; block until it is there (a TensorFlow graph's edge does the waiting itself)."""


class Done:
    """A handle that needs no waiting: its result is there."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        """Return the result."""
        return self._result


@runtime_checkable
class Group(Protocol):
    """An ordered set of ranks and the collectives among them, on the active framework's tensors.

    Every member calls the same operations in the same order with the same names. With one member
    every operation is the identity and no library is called. Sums, never averages: who sums knows the weights.
    dtypes of sums: float32, float64, float16, int32, int64. What only travels may be int8, uint8 and int16 as well.
    A name begins with its purpose and a dot (``gradients.3``); ``traffic`` is counted by ``purpose/operation``.
    """

    ranks: tuple[int, ...]
    traffic: dict[str, Traffic]

    def all_reduce_async(self, tensor: Tensor, name: str, op: str = "sum") -> Handle:
        """Start the sum over members, shape ``[...]`` kept; torch sums in place. ``op`` adasum: Maleki et al. 2020."""

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``all_gather``."""

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``reduce_scatter``."""

    def broadcast_async(self, tensor: Tensor, root: int, name: str) -> Handle:
        """Start ``broadcast`` in the background (not inside a TensorFlow graph).

        Members may start several in different orders: they are matched by name.
        """

    def all_to_all_async(self, tensor: Tensor, name: str) -> Handle:
        """Start ``all_to_all``."""

    def all_reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Return the sums over members of every tensor, as one fused operation; ``tensors`` may be overwritten."""

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Return ``[sum of n_i, ...]`` from members' ``[n_i, ...]``, in rank order."""

    def reduce_scatter(self, tensor: Tensor, name: str) -> Tensor:
        """Return this member's ``[n / size, ...]`` of the sum of members' ``[n, ...]``."""

    def broadcast(self, tensor: Tensor, root: int, name: str) -> Tensor:
        """Return the tensor of member number ``root`` (its place in ``ranks``)."""

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Return ``[n, ...]``: part j of every member's equally split ``[n, ...]`` goes to member j."""

    def barrier(self) -> None:
        """Return when all members have called it."""


class World(Protocol):
    """One run's ranks. Started by a Backend, ended by the loop.

    Attributes:
        transport: the library that moves the bytes.
        ledger: what collectives this rank has called, for whoever has to explain a hang.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    transport: str
    recorder: FlightRecorder

    def group(self, ranks: Sequence[int]) -> Group:
        """Return the group of these ranks, made at the start from the mesh; HvdlmError for any other."""

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return rank ``root``'s JSON-like ``value`` on all ranks. All ranks call."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's JSON-like ``value``, in rank order, on all ranks. All ranks call."""

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is set. All ranks call."""

    def agree(self, counts: Sequence[int]) -> Handle:
        """Start to add up every rank's ``counts`` (small whole numbers), the same number of them on all ranks.

        Travels in the background: waited for a step later, it costs next to nothing. ``wait`` returns ``list[int]``.
        All ranks call, and one agreement is under way at a time.
        """

    def broadcast_bytes(self, data: bytes | None, root: int) -> bytes:
        """Return rank ``root``'s ``data`` (below 2 GB) on all ranks. All ranks call; the others' is ignored."""

    def raw(self, collective: str, array: np.ndarray, in_place: bool = False) -> Callable[[], Any] | None:
        """Return a function that does the transport's own collective on flat ``array``, nothing of hvdlm in between.

        ``collective`` is the name of a Group's method, ``in_place`` whether a sum replaces what was summed; None where
        the transport can't be called. For measurements.
        """

    def transfer_seconds(self) -> float | None:
        """Return the seconds that this rank's collectives took so far, in the background or not; None: not known."""

    def abort(self, code: int) -> None:
        """End all ranks at once with this exit code; does not return."""

    def close(self) -> None:
        """Leave in good order. All ranks call."""


class Backend(Protocol):
    """How ranks meet, and which library moves the bytes."""

    name: str

    def launch_shape(self) -> tuple[int, int, int, int]:
        """Return (rank, size, local rank, local size) as the launcher's environment tells, nothing imported.

        Raises:
            HvdlmError: the launcher speaks of ranks that this backend can't reach.
        """

    def start(self, framework: Framework, groups: Sequence[tuple[int, ...]], config: Config) -> World:
        """Meet the other ranks. ``groups``: every set of ranks that will be asked for, the same list on all ranks.

        Raises:
            HvdlmError: the transport is not built, or fewer ranks are found than the launcher started.
        """


class Trainable(Protocol):
    """A model on this rank with its optimizer: computes, exchanges gradients, updates."""

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, step: int, limit: float = float("inf")
    ) -> StepResult:
        """Do one optimizer step on this rank's rows of the global batch. All ranks call, with equally many.

        Gradients that are not finite, or whose norm is above ``limit``, are not applied (``StepResult.skipped``).
        """

    def eval_step(self, batch: Batch) -> tuple[float, float]:
        """Return (sum of losses over valid tokens in nats, valid tokens) of this rank's rows.

        No communication along the data axis. The losses are right on the ranks of the last pipeline stage.
        """

    def logits(self, tokens: np.ndarray, cache: Any = None) -> tuple[np.ndarray, Any]:
        """Continue ``cache`` (None: from the start) by ``tokens`` int32 ``[rows, time]``.

        All ranks that hold a copy of the model call, with the same tokens.

        Returns:
            float32 ``[rows, vocab]``: the scores of what follows the last token; and the grown cache.
        """

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the scores of everything the batch asks for, float32 ``[rows, time, vocab]``. No communication."""

    def read(self, batch: Batch) -> Any:
        """Return the cache from which ``logits`` goes on when the model has read the batch's features."""

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache whose row i is row ``rows[i]`` of ``cache``, of a model that reads features."""

    def fingerprints(self) -> dict[str, int]:
        """Return a CRC-32 of every parameter (of this rank's part of it), by global name.

        Equal on all ranks of the data axis; empty where their parameters may differ now (rarer synchronisation).
        """

    def memory(self) -> dict[str, int]:
        """Return the bytes that this rank holds for parameters, gradients, optimizer and activations.

        Activations: the most that was kept at once for the backward pass, as measured in the first step.
        """

    def traffic(self) -> dict[str, Traffic]:
        """Return what the collectives of all groups of this rank moved so far, by ``purpose/operation``."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all that training goes on from, under global names.

        ``parameters/NAME`` as in the ModelSpec, ``optimizer/KIND/NAME`` of the parameter's shape, ``exchange/...``,
        and ``carry/...`` of recurrent models.
        """

    def shards(self) -> dict[str, Shard]:
        """Return which part of the global array every entry of ``state()`` holds, but for ``exchange/``."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what ``state()`` returned, perhaps in the other framework or on another number of ranks.

        ``optimizer/``, ``exchange/`` and ``carry/`` entries may be missing: they then start afresh.
        """


class HostCollective(Protocol):
    """A collective on a contiguous array in host memory."""

    def __call__(self, array: np.ndarray, arrived: Callable[[], None] | None) -> Handle:
        """Start it; ``arrived`` returns when the array's values are there (None: they are). The result is an array."""


class HostTensors(Protocol):
    """Takes a framework's tensors through host memory, for transports that know arrays alone (backend mpi4py)."""

    def through(self, tensor: Tensor, collective: HostCollective, shape: tuple[int | None, ...]) -> Handle:
        """Start ``collective`` on the values of ``tensor``; the handle's result is a tensor of what it returns.

        The array is contiguous and may share the tensor's memory; where ``Framework.in_place``, the collective may
        return the array itself, overwritten, and the result is then ``tensor``, overwritten. Inside a graph,
        collectives start in the order in which they were traced, and ``wait`` waits where it is traced. ``shape`` is
        that of the result, None where it isn't known before.
        """

    def together(self, tensors: Sequence[Tensor], collective: HostCollective) -> Handle:
        """Start ``collective`` (a sum) once, on the values of all ``tensors``, which are of one dtype.

        The handle's result is a list of tensors of the same shapes; ``tensors`` may be overwritten.
        """


class Framework(Protocol):
    """A deep-learning framework: builds Trainables from descriptions. ``in_place``: whether it sums in place.

    A framework whose tensors are not arrays in host memory has another attribute, ``host_tensors`` (HostTensors), where
    it is to communicate by backend ``mpi4py``; the others' are read by ``numpy.asarray``, and made by ``tensor``.
    """

    name: str
    in_place: bool

    def build(self, model: ModelSpec, mesh: Mesh, world: World, exchange: Exchange, config: Config) -> Trainable:
        """Return the model at its initial values (``ModelSpec.initial``), ready to train. No communication."""

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return ``array`` on this rank's device; may share its memory."""


class Exchange(Protocol):
    """Turns this rank's gradients into those that the optimizer applies.

    The framework hands over its gradients in flat buckets, in the order in which the backward pass finishes them, and
    the exchange answers with handles, so that communication overlaps with the rest of the backward pass. One step is:
    ``begin``, ``start`` for every bucket and ``start_metrics``, waiting for all, the update, ``finish``.

    Attributes:
        size: ranks along the data axis.
        apart: whether ranks' parameters and optimizer states differ between steps (rarer synchronisation).
        agreed: whether all ranks have the same parameters now, after the last step.
        stands_for: for how many ranks this step's metrics stand: 1 where they were summed over all.
        part, parts: this rank updates part number ``part`` of ``parts`` equal parts of every bucket (ZeRO); 0, 1: all.
        scatters_every: whether every micro-batch's gradients are scattered, so that none are kept whole (ZeRO-2).
        traffic: the group's counters.
    """

    size: int
    apart: bool
    agreed: bool
    stands_for: int
    part: int
    parts: int
    scatters_every: bool
    traffic: dict[str, Traffic]

    def open(self, layout: FlatLayout, parameters: np.ndarray) -> None:
        """Begin from flat float32 ``parameters`` ``[size]``; again whenever they are replaced. All ranks call."""

    def begin(self, step: int) -> Hashable:
        """Prepare for ``step``; return its phase: steps of one phase call the same collectives (and share a graph)."""

    def start(self, bucket: Tensor, index: int) -> Handle:
        """Begin to sum flat ``bucket`` ``[elements]`` over the data axis; ``index`` numbers the buckets of a step.

        The answer is this rank's part of the sum, ``[elements / parts]``.
        """

    def start_metrics(self, values: Tensor) -> Handle:
        """Begin to sum float64 ``[n]`` (loss sum, valid tokens) over the data axis."""

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return every bucket's updated parameters, ``[elements]``, from this rank's parts of them."""

    def finish(self, parameters: Tensor) -> Tensor | None:
        """Return what the updated flat ``parameters`` ``[size]`` are replaced by; None: they stay."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of what the exchange remembers from step to step (error feedback), for the checkpoint."""

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what ``state()`` returned; missing entries start afresh."""


@dataclass(frozen=True)
class Request:
    """One round's collective in ``Compressor.reduce``: ``kind`` is all_reduce, all_gather or all_to_all.

    The answer is a list as long as ``tensors``: their sums; or members' tensors as ``[size, ...]``; or, for
    all_to_all of ``[size * n]``, the parts meant for this member as ``[size, n]``.
    """

    kind: str
    tensors: Sequence[Tensor]


Reduced = tuple[Tensor, Callable[[], Tensor]]
"""What all ranks' tensors sum up to, and a function that returns this rank's contribution as the others see it."""


class Compressor(Protocol):
    """Makes tensors small for their journey; written once for both frameworks, on ``keras.ops``.

    ``hvdlm_compression.base.Compressor`` needs only ``compress`` and ``decompress``, and makes the rest of them.

    Attributes:
        matrices: takes one float32 ``[rows, columns]`` after the other; else all of a bucket as one ``[n]``.
        biased: whether error feedback is on by default.
        feeds_back: whether the algorithm keeps what it left out itself: no error feedback is then added.
    """

    matrices: bool
    biased: bool
    feeds_back: bool

    def begin(self, step: int) -> Hashable:
        """Prepare for ``step``; return its phase, see ``Exchange.begin``."""

    def payload_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a tensor of ``shape`` hands to collectives in a step."""

    def memory(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return what is remembered from step to step for a tensor of ``shape``, at its start."""

    def reduce(
        self, tensor: Tensor, memory: Mapping[str, Any], step: Tensor
    ) -> Generator[Request, list[Tensor], Reduced]:
        """Yield each round's request, be sent its answer, and return the sum; ``memory`` holds keras Variables."""


CompressorMaker = Callable[["CompressionConfig", int, int, int], Compressor]
"""(settings, seed, place of this rank, ranks) -> Compressor; may import keras."""


class Scheduler(Protocol):
    """Writes the job files of one scheduler; a module with these two names is one."""

    @property
    def CLIENT(self) -> Sequence[str]:
        """The command that submits the job file which it reads from standard input."""

    def write(self, job: Any, arguments: Sequence[str], config: Config) -> str:
        """Return the job file that trains with ``arguments`` on the ranks of ``job`` (an ``hvdlm_launchers.schedulers.job.Job``).

        ``config``: what the arguments mean. The job has to run ``job.setup`` first, to tell the run SIGUSR1
        ``job.save_seconds`` before its time is over, to train with ``--checkpoint.resume auto``, and to run again where
        the run ends with code 75. ``hvdlm_launchers.schedulers.script`` has the shell for it.

        Raises:
            HvdlmError: the scheduler can't do what the job asks for.
        """


class Task(Protocol):
    """What a batch, a loss and a metric are; ``tokenizer`` turns text into ids below ``vocab``.

    ``fingerprint``: says which data it is, the same on all ranks that have the same. ``reads``: the names of its
    batches' features, those of ``ModelSpec.reads``.
    """

    tokenizer: Any
    vocab: int
    fingerprint: str
    reads: tuple[str, ...]

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``: depends on nothing but the seed and the number.

        Rows count on into the next batch, where a run goes on with another batch size.
        """

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield the whole validation split, ``rank``'s share of it, in a fixed order.

        Ranks may get different numbers of batches: nothing in evaluation communicates per batch.
        """

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return what ``metrics`` needs of a validation batch beside its loss: figures that add up over batches."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return named figures (``val_loss``, ``perplexity``, ...) from sums over all batches and ranks.

        ``sums``: ``loss`` (nats), ``tokens``, and what ``count`` returned.
        """

    def respond(self, trainable: Trainable, prompt: str) -> str | None:
        """Return what the model makes of ``prompt``; None: it goes on with the text, token by token.

        All ranks that hold a copy of the model call.
        """


class Scorer(Protocol):
    """A trained language model beside the one that is trained: says how likely texts are.

    ``fingerprint``: says which model it is, for a task's own. It stands on every rank; nothing communicates.
    """

    fingerprint: str

    def logs(self, texts: Sequence[str]) -> np.ndarray:
        """Return the log-probability of each text as a whole line, its end included: float64 ``[texts]``, in nats.

        The first call builds the model: ranks have to have met.
        """


OpenScorer = Callable[[str, str, str], Scorer]
"""(the option that names it, the folder of its run, the characters of all texts) -> Scorer.

HvdlmError where there is no language model, or its vocabulary can't write these characters. Nothing is computed yet.
"""
