"""Hardware files: the rates of a machine's devices and links, measured or from data sheets, as YAML.

All figures are in SI units: bytes, seconds, FLOPs (multiplications and additions) and their ratios. A file needs few of
the fields; ``docs/planning.md`` explains each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, safe_yaml, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm.planning import yaml_fields

_MAX_BYTES = 4_000_000  # of a hardware file
ANY = "any"
OUTER_UPDATE = "outer_update"  # among compressors: the update of all parameters after a round of local SGD or DiLoCo


@dataclass(frozen=True)
class Sharing:
    """How much longer computation takes on each of ``ranks`` ranks of one node than on a rank that has it alone.

    Attributes:
        ranks: ranks on the node.
        products: factor on the seconds of products and attention.
        memory: factor on the seconds of element-wise operations, the loss and the update.
        overhead: factor on the seconds per operation, micro-batch and step.
    """

    ranks: int
    products: float = 1.0
    memory: float = 1.0
    overhead: float = 1.0


@dataclass(frozen=True)
class CompressorRate:
    """Seconds of a compressor, or of a round's outer update, beside its collectives.

    Attributes:
        seconds_per_element: of compressing, with error feedback, and of replacing the gradient.
        seconds_per_received_element: of decompressing the payload of one rank, for each that is gathered.
        seconds_per_bucket: of every bucket, beside its elements; of an outer update: of every round.
        seconds_per_tensor: of every tensor that is compressed by itself, beside its elements: of starting operations.
    """

    seconds_per_element: float
    seconds_per_received_element: float = 0.0
    seconds_per_bucket: float = 0.0
    seconds_per_tensor: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Rates of one rank's device in one framework and precision.

    Attributes:
        product_flops_per_second: peak rate of dense products, as in data sheets.
        product_efficiency: share of the peak that large products reach.
        half_rate_flops: FLOPs of a product that reaches half of that rate.
        products: measured products: rows (m), inner dimension (k), columns (n), seconds.
        attention_efficiency: share of the peak that attention reaches in the forward pass.
        attention_backward: seconds of attention's backward pass, as a multiple of the forward pass's.
        attention: measured attention: rows x heads, positions, width of a head, forward and backward seconds.
        memory_bytes_per_second: bytes that element-wise operations read and write.
        update_seconds_per_element: of the optimizer's update, by its state vectors (0, 1, 2); empty: by the bytes.
        loss_seconds_per_score: softmax, loss and their gradient, of each logit; None: by the bytes.
        seconds_per_operation: of every operation that is started, beside its work.
        seconds_per_micro_batch: of every micro-batch, beside its operations.
        seconds_per_step: of every step, beside its micro-batches and its update.
        seconds_per_time_step: of one time step of a recurrent layer, forward and backward, beside its products.
        product_bytes_per_second: at which products read their factors and write their results, in seconds beside those
            of their FLOPs; None: ``memory_bytes_per_second``.
        overlap_slowdown: factor on the seconds of computation while a collective is under way; None: the hardware's.
        collective_slowdown: factor on the seconds of a collective while computation is under way beside it.
        blocking_seconds: of every collective between tensor ranks, beside its own: ranks don't arrive at once.
        blocking_factor: on the seconds of such a collective itself.
        pass_seconds: of every pass of a pipeline stage, beside its operations: of what starts it and its messages.
        bubble_factor: of the seconds for which pipeline stages wait, the share that a step takes longer: meanwhile,
            ranks that share cores with them are faster. None: none where ranks share cores, else all.
        seconds_per_gathered_element: of the parameters that ZeRO gathers, beside the collective and the copy.
        seconds_per_scattered_element: of the gradients that ZeRO-2 scatters in a micro-batch, beside the collective.
        compressors: seconds of compressors, and of a round's outer update by its exchange; others: the hardware's.
        framework, precision: for which they hold; ``any``: for all that have no entry of their own.
        ranks: ranks on the node with which they were measured; 0: ``sharing`` tells the difference.
    """

    product_flops_per_second: float
    memory_bytes_per_second: float
    product_efficiency: float = 1.0
    half_rate_flops: float = 0.0
    products: tuple[tuple[float, ...], ...] = ()
    attention_efficiency: float = 0.5
    attention_backward: float = 2.5
    attention: tuple[tuple[float, ...], ...] = ()
    update_seconds_per_element: tuple[float, ...] = ()
    loss_seconds_per_score: float | None = None
    seconds_per_operation: float = 0.0
    seconds_per_micro_batch: float = 0.0
    seconds_per_step: float = 0.0
    seconds_per_time_step: float = 0.0
    product_bytes_per_second: float | None = None
    overlap_slowdown: float | None = None
    collective_slowdown: float = 1.0
    blocking_seconds: float = 0.0
    blocking_factor: float = 1.0
    pass_seconds: float = 0.0
    bubble_factor: float | None = None
    seconds_per_gathered_element: float = 0.0
    seconds_per_scattered_element: float = 0.0
    compressors: Mapping[str, CompressorRate] = field(default_factory=dict)
    framework: str = ANY
    precision: str = ANY
    ranks: int = 0


@dataclass(frozen=True)
class Link:
    """A link, one direction. Of ``node``: between two ranks of a node; of ``network``: of a node to all others.

    Attributes:
        latency_seconds: of one message, software included.
        bytes_per_second: that collectives reach.
    """

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class MeasuredCollective:
    """Seconds of one collective by its bytes, ascending.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast or all_to_all.
        ranks: the group's size.
        bytes: of the whole tensor: the sum's, what is gathered or scattered in all, what is broadcast.
        link: node, or network where the group has ranks on several nodes.
        framework: whose call was measured; ``any``: for all.
        ranks_per_node: ranks on a node, of all groups that called it at the same time; 0: any number. A pair among four
            ranks that share two cores waits longer than a pair that has them alone.
    """

    operation: str
    ranks: int
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    link: str = "node"
    framework: str = ANY
    ranks_per_node: int = 0


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: in one line.
        fitted_on: what its figures were taken from or fitted on.
        tested_on: what its predictions were compared with, and their error.
        device: cpu or gpu; on a gpu, ``train.precision auto`` is bf16 and ``train.compile auto`` compiles GPTs.
        ranks_per_node: ranks that a node has in a large run; those of a smaller run are all on one node.
        memory_bytes: of one rank's device; None: unknown.
        reserved_bytes: memory that a run can't use, by what takes it.
        rates: by framework, precision and ranks on a node; the entry that fits best counts.
        sharing: how ranks of a node slow each other down.
        links: node and network.
        collectives: measured ones; others follow from the links.
        overlap_slowdown: factor on the seconds of computation while a collective is under way.
        speed_deviation: relative standard deviation of the devices' speeds; a step waits for the slowest of them.
        gathers_by_ring: whether all-gathers and reduce-scatters are rings even for few bytes, as NCCL's are.
        cores_per_node: cores that a node's ranks share; 0: each rank has a device of its own.
        compressors: by ``communication.compression.algorithm``.
        data_seconds_per_token: of making a batch, on one rank's thread.
        measured: when, where and by which versions, where plan --measure wrote the file.
        save_bytes_per_second: at which a save copies a rank's state while training is paused.
    """

    name: str
    fitted_on: str
    tested_on: str
    rates: tuple[Rates, ...]
    links: Mapping[str, Link]
    device: str = "cpu"
    ranks_per_node: int = 1
    memory_bytes: float | None = None
    reserved_bytes: Mapping[str, float] = field(default_factory=dict)
    sharing: tuple[Sharing, ...] = ()
    collectives: tuple[MeasuredCollective, ...] = ()
    overlap_slowdown: float = 1.0
    speed_deviation: float = 0.0
    gathers_by_ring: bool = False
    cores_per_node: int = 0
    compressors: Mapping[str, CompressorRate] = field(default_factory=dict)
    data_seconds_per_token: float = 0.0
    save_bytes_per_second: float | None = None
    measured: Mapping[str, str] = field(default_factory=dict)

    def rates_of(self, framework: str, precision: str, ranks: int = 1) -> Rates:
        """Return the rates that fit best: of the framework, then the precision, then the ranks on a node."""

        def fits(rates: Rates) -> bool:
            return rates.framework in (ANY, framework) and rates.precision in (ANY, precision)

        fitting = [rates for rates in self.rates if fits(rates)]
        if not fitting:
            known = ", ".join(sorted({f"{rates.framework} in {rates.precision}" for rates in self.rates}))
            raise HvdlmError(
                f"the hardware {shown(self.name)} has no rates of {framework} in {precision} (it has: {known}): "
                "measure them with plan --measure, or add an entry to its rates."
            )

        def rank(rates: Rates) -> tuple[bool, bool, float, bool]:
            distance = abs(math.log((rates.ranks or ranks) / ranks))
            return (rates.framework == ANY, rates.precision == ANY, distance, rates.ranks == 0)

        return min(fitting, key=rank)

    def sharing_of(self, ranks: int, rates: Rates) -> Sharing:
        """Return the factors for ``ranks`` ranks on a node, which are 1 for rates measured with so many."""
        if rates.ranks == ranks or not self.sharing:
            return Sharing(ranks)
        return min(self.sharing, key=lambda sharing: abs(math.log(sharing.ranks / ranks)))


def read_hardware(source: str | Path) -> Hardware:
    """Return the machine of a YAML file, or of the name of one that comes with hvdlm.

    Raises:
        HvdlmError: no such file or name, or the first wrong field.
    """
    path = find_hardware(str(source))
    try:
        content = safe_yaml.load(untrusted_input.read(path, _MAX_BYTES).decode(), yaml.safe_load)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise HvdlmError(f"the hardware file {path} can't be read: {reason}") from error
    try:
        hardware: Hardware = yaml_fields.build(Hardware, content)
        _check(hardware)
    except ValueError as error:
        raise HvdlmError(f"the hardware file {path}: {error}.") from error
    return hardware


def write_hardware(hardware: Hardware, path: str | Path) -> None:
    """Write a hardware file, atomically; fields that have their defaults are left out."""
    atomic_files.replace(Path(path), yaml.safe_dump(yaml_fields.plain(hardware), sort_keys=False, width=120))


def named_files() -> dict[str, Path]:
    """Return the hardware files that come with hvdlm, by name."""
    from importlib.util import find_spec

    spec = find_spec("hvdlm_planner")
    folder = Path(spec.origin).parent / "machines" if spec and spec.origin else Path()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_hardware(source: str) -> Path:
    """Return the path of a hardware file, or of the one of this name that comes with hvdlm.

    Raises:
        HvdlmError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    named = named_files()
    if source in named:
        return named[source]
    raise HvdlmError(f"there is no hardware file {shown(source)}, and none of that name: {', '.join(named)}.")


def _check(hardware: Hardware) -> None:
    for name in ("node", "network"):
        if name not in hardware.links:
            raise ValueError(f"links.{name} is missing: give latency_seconds and bytes_per_second")
    if not hardware.rates:
        raise ValueError("rates has no entry: give at least one")
    for index, rates in enumerate(hardware.rates):
        _check_rows(rates.products, 4, f"rates[{index}].products", "rows, inner dimension, columns, seconds")
        columns = "rows x heads, positions, width, forward and backward seconds"
        _check_rows(rates.attention, 5, f"rates[{index}].attention", columns)
    for index, curve in enumerate(hardware.collectives):
        if not curve.bytes or len(curve.bytes) != len(curve.seconds) or list(curve.bytes) != sorted(set(curve.bytes)):
            raise ValueError(f"collectives[{index}]: bytes and seconds must be as many, at least one, bytes ascending")


def _check_rows(rows: tuple[tuple[float, ...], ...], count: int, where: str, columns: str) -> None:
    for row in rows:
        if len(row) != count or min(row) <= 0:
            raise ValueError(f"{where}: every row has {count} numbers above 0 ({columns})")
