"""Seconds of single operations on a machine: products by shape, attention, passes; collectives by size and group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from hvdlm.parallel.mesh import Mesh, levels
from hvdlm.planning.hardware import ANY, Hardware, Link, MeasuredCollective, Rates, Sharing
from hvdlm.planning.work import Attention, Collective, Pass

Shape = tuple[float, ...]
Formula = Callable[[Shape], float]

_NEIGHBOURS = 8  # measured shapes from which that of another one is interpolated


class Computation:
    """Seconds of what one rank computes, with ``ranks`` ranks on its node: of the slowest of ``world`` ranks."""

    def __init__(self, hardware: Hardware, framework: str, precision: str, ranks: int = 1, world: int = 1) -> None:
        self.rates: Rates = hardware.rates_of(framework, precision, ranks)
        self.slowest = slowest_of(world, hardware.speed_deviation)
        sharing = hardware.sharing_of(ranks, self.rates)
        factors = (self.slowest * factor for factor in (sharing.products, sharing.memory, sharing.overhead))
        self.sharing = Sharing(ranks, *factors)
        self.item = 4 if precision in ("fp32", "tf32") else 2
        self._products = _Table(self.rates.products, 3, lambda shape: self._product(*shape))
        self._attention = [
            _Table(tuple((*row[:3], row[3 + index]) for row in self.rates.attention), 3, self._attend(index))
            for index in (0, 1)
        ]
        self._known: dict[Shape, float] = {}

    def product(self, m: float, k: float, n: float) -> float:
        """Return the seconds of one product of ``[m, k]`` and ``[k, n]``."""
        key = (m, k, n)
        if key not in self._known:
            self._known[key] = self.sharing.products * self._product(m, k, n) * self._products.ratio(key)
        return self._known[key]

    def _product(self, m: float, k: float, n: float) -> float:
        rates = self.rates
        computed = (2.0 * m * k * n + rates.half_rate_flops) / (
            rates.product_flops_per_second * rates.product_efficiency
        )
        moved = self.item * (m * k + k * n + m * n)
        return computed + moved / (rates.product_bytes_per_second or rates.memory_bytes_per_second)

    def _attend(self, backward: int) -> Formula:
        def seconds(shape: Shape) -> float:
            heads, time, width = shape
            rate = self.rates.product_flops_per_second * self.rates.attention_efficiency
            forward = 2.0 * heads * time * time * width / rate
            if self.rates.product_bytes_per_second is None:
                forward = max(forward, 4.0 * self.item * heads * time * width / self.rates.memory_bytes_per_second)
            return forward * (self.rates.attention_backward if backward else 1.0)

        return seconds

    def attention(self, one: Attention) -> float:
        """Return the seconds of attention, or of its backward pass."""
        shape, table = (one.heads, one.time, one.width), self._attention[one.backward]
        return one.count * self.sharing.products * self._attend(one.backward)(shape) * table.ratio(shape)

    def bytes(self, count: float) -> float:
        """Return the seconds of reading and writing ``count`` bytes."""
        return self.sharing.memory * count / self.rates.memory_bytes_per_second

    def seconds(self, one: Pass) -> float:
        """Return the seconds of a pass without its collectives."""
        rates, sharing = self.rates, self.sharing
        total = sum(p.count * self.product(p.m, p.k, p.n) for p in one.products)
        total += sum(self.attention(attention) for attention in one.attention)
        total += self.bytes(one.bytes) + self.slowest * one.seconds
        if rates.loss_seconds_per_score is None:
            total += self.bytes(12.0 * one.scores)  # read and written: as products, as softmax, as gradient
        else:
            total += sharing.memory * 0.5 * rates.loss_seconds_per_score * one.scores  # forward and backward half each
        total += sharing.overhead * rates.seconds_per_operation * one.operations
        return total + sharing.overhead * 0.5 * rates.seconds_per_time_step * one.time_steps

    def update(self, elements: float, moments: int, other_bytes: float) -> float:
        """Return the seconds of the optimizer's update."""
        known = self.rates.update_seconds_per_element
        if known:
            seconds = self.sharing.memory * elements * known[min(moments, len(known) - 1)]
        else:
            seconds = self.bytes(4.0 * elements * (4 + 2 * moments))
        return seconds + self.bytes(other_bytes)

    def overhead(self, micro_batches: int) -> float:
        """Return the seconds of a step and its micro-batches beside all operations."""
        rates = self.rates
        return self.sharing.overhead * (rates.seconds_per_step + micro_batches * rates.seconds_per_micro_batch)


class _Table:
    """Measured seconds by shape: factors on those of the formula, interpolated in the shapes' logarithms."""

    def __init__(self, rows: Sequence[Shape], columns: int, formula: Formula) -> None:
        self._logs = np.log(np.array([row[:columns] for row in rows], float)) if rows else None
        self._ratios = np.array([math.log(row[columns] / formula(tuple(row[:columns]))) for row in rows])

    def ratio(self, shape: Shape) -> float:
        """Return by how much a product of this shape takes longer than by the formula; 1 without a table."""
        if self._logs is None:
            return 1.0
        distances = np.square(self._logs - np.log(np.array(shape, float))).sum(1)
        nearest = np.argsort(distances)[:_NEIGHBOURS]
        if distances[nearest[0]] < 1e-9:
            return float(math.exp(self._ratios[nearest[0]]))
        weights = 1.0 / distances[nearest]
        return float(math.exp((weights * self._ratios[nearest]).sum() / weights.sum()))


class Network:
    """Seconds of collectives among ranks of a mesh, which fill node after node."""

    def __init__(self, hardware: Hardware, mesh: Mesh, framework: str = ANY, ranks_per_node: int | None = None) -> None:
        self.hardware = hardware
        self.mesh = mesh
        self.per_node = min(ranks_per_node or hardware.ranks_per_node, mesh.size)
        self._curves = [c for c in hardware.collectives if c.framework in (ANY, framework)]
        axes = ("data", "pipeline", "tensor", "model", "ends", *(("node", "between") if mesh.has_levels else ()))
        self._shapes = {axis: self._shape(axis) for axis in axes}

    def _shape(self, axis: str) -> tuple[int, int]:
        """Return (nodes, ranks on each of them) of the group of rank 0 along ``axis``."""
        if axis == "model":
            ranks = self.mesh.model_group(0)
        elif axis == "ends":  # the first and the last stage
            ranks = tuple(sorted({self.mesh.group("pipeline", 0)[index] for index in (0, -1)}))
        elif axis in ("node", "between"):
            within, between = levels(self.mesh.group("data", 0), 0, self.mesh.data_per_node)
            ranks = within if axis == "node" else between
        else:
            ranks = self.mesh.group(axis, 0)
        nodes = len({rank // self.per_node for rank in ranks})
        return nodes, -(-len(ranks) // nodes)

    def seconds(self, collective: Collective) -> float:
        """Return the seconds of a collective, all calls of it together."""
        nodes, local = self._shapes[collective.axis]
        if nodes * local < 2 or not collective.count:
            return 0.0
        if collective.operation == "send":
            nodes, local = self._pair()
        seconds = self.measured(collective.operation, collective.bytes, nodes, local)
        if seconds is None:
            seconds = self.by_formula(collective.operation, collective.bytes, nodes, local)
        return collective.count * seconds

    def _pair(self) -> tuple[int, int]:
        """Return (nodes, ranks on each) of two neighbouring stages: the slowest pair of a line counts."""
        line = self.mesh.group("pipeline", 0)
        across = any(a // self.per_node != b // self.per_node for a, b in itertools.pairwise(line))
        return (2, 1) if across else (1, 2)

    def measured(self, operation: str, size: float, nodes: int, local: int) -> float | None:
        """Return the seconds by a measured table; of another group's size, scaled as by the formula."""
        operation = "broadcast" if operation == "send" else operation
        link, ranks = ("node" if nodes == 1 else "network"), nodes * local
        fitting = [c for c in self._curves if c.operation == operation and c.link == link]
        if not fitting:
            return None

        def distance(c: MeasuredCollective) -> tuple[float, float, bool]:
            own = c.ranks_per_node or self.per_node
            return abs(math.log(c.ranks / ranks)), abs(math.log(own / self.per_node)), c.framework == ANY

        curve = min(fitting, key=distance)
        seconds = _interpolated(curve, size)
        if curve.ranks == ranks:
            return seconds
        own = (nodes, local) if nodes == 1 else (max(2, curve.ranks // local), local)
        other = (1, curve.ranks) if nodes == 1 else own
        scale = self.by_formula(operation, size, nodes, local) / self.by_formula(operation, size, *other)
        return seconds * scale

    def by_formula(self, operation: str, size: float, nodes: int, local: int) -> float:
        """Return the seconds by latency and bandwidth: the better of a ring and of recursive doubling.

        Thakur et al. 2005, section 4: a ring moves ``(n - 1) / n`` of the bytes in ``n - 1`` messages, recursive
        doubling in ``log2 n``; an all-reduce is a reduce-scatter and an all-gather, or for few bytes ``log2 n``
        exchanges of all of them.
        """
        ranks = nodes * local
        node, network = self.hardware.links["node"], self.hardware.links["network"]
        link = self._slowest(nodes, local)
        wire = size / link.bytes_per_second
        if operation in ("send", "broadcast"):
            return link.latency_seconds + wire
        ring = (ranks - nodes) * node.latency_seconds + (nodes * network.latency_seconds if nodes > 1 else 0.0)
        tree = math.log2(local) * node.latency_seconds + math.log2(nodes) * network.latency_seconds
        share = (ranks - 1) / ranks * wire
        if operation in ("all_gather", "reduce_scatter", "all_to_all"):
            return (ring if self.hardware.gathers_by_ring else min(ring, tree)) + share
        return min(2.0 * ring + 2.0 * share, 2.0 * tree + 2.0 * wire, tree + max(1.0, math.log2(ranks)) * wire)

    def _slowest(self, nodes: int, local: int) -> Link:
        """Return the link that bounds a group: a node's network is shared by the groups that cross it."""
        node, network = self.hardware.links["node"], self.hardware.links["network"]
        if nodes == 1:
            return node
        shared = network.bytes_per_second * local / self.per_node
        return Link(network.latency_seconds, min(shared, node.bytes_per_second) if local > 1 else shared)


def _interpolated(curve: MeasuredCollective, size: float) -> float:
    """Return the seconds for ``size`` bytes: linear between measured ones, beyond them as between the last two."""
    sizes, seconds = curve.bytes, curve.seconds
    if size >= sizes[-1]:
        if len(sizes) == 1:
            return seconds[-1] * size / sizes[-1]
        return seconds[-1] + (size - sizes[-1]) * (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return float(np.interp(size, sizes, seconds))


def slowest_of(ranks: int, deviation: float) -> float:
    """Return by what factor the slowest of ``ranks`` devices is expected to be slower than the mean.

    The expected maximum of normally distributed values, by Blom's approximation (1958).
    """
    if ranks < 2 or not deviation:
        return 1.0
    return 1.0 + deviation * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
