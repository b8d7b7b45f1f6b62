"""How long a collective takes over links of given latency and bandwidth, which collectives share.

Every collective takes the time of a ring of its ranks (Thakur et al. 2005, section 4), of which the slowest link and
the highest latency count. ``N``: the bytes that a rank hands over; ``n`` ranks; ``b``: bandwidth, ``a``: latency.

=========================  ================================
all_reduce, agree          2 (n - 1) / n * N / b + 2 (n - 1) a
reduce_scatter, all_to_all (n - 1) / n * N / b + (n - 1) a
all_gather, gather         (n - 1) * N / b + (n - 1) a
broadcast                  N / b + (n - 1) a
barrier                    2 (n - 1) a
=========================  ================================

A rank's port, and a node's for links across nodes, carries one collective at a time: of several that use it, each
starts its transfer when those that began before it have ended theirs, so that together they take as long as if they
shared the bandwidth. Latencies overlap.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Hashable
from typing import NamedTuple

from hvdlm_backends.injected_conditions import Conditions, LinkRule, applies
from hvdlm_backends.threads_network import Call


class Route(NamedTuple):
    """The links of a group: the longest latency (s), the lowest bandwidth (bytes/s), and the ports that they use."""

    latency: float
    bandwidth: float
    ports: tuple[Hashable, ...]


class Links:
    """The links of a world."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self._lock = threading.Lock()
        self._free: dict[Hashable, float] = {}  # when a port has ended the transfers so far
        self._routes: dict[tuple[tuple[int, ...], bool, tuple[LinkRule, ...]], Route] = {}

    def complete_at(self, call: Call, began: float) -> float:
        """Return when a collective is complete that began at ``began``, both in seconds of the same clock."""
        rules = tuple(rule for rule in self._conditions.links if applies(rule, call.step))
        if not rules:
            return began
        route = self._route(call.ranks, call.operation == "all_to_all", rules)
        sent, messages = volume(call.operation, len(call.ranks), call.bytes)
        with self._lock:
            start = max([began, *(self._free.get(port, began) for port in route.ports)])
            end = start + sent / route.bandwidth
            self._free.update(dict.fromkeys(route.ports, end))
        return end + messages * route.latency

    def _route(self, ranks: tuple[int, ...], all_pairs: bool, rules: tuple[LinkRule, ...]) -> Route:
        key = (ranks, all_pairs, rules)
        if key not in self._routes:
            ring = zip(ranks, [*ranks[1:], ranks[0]], strict=True)
            pairs = list(itertools.combinations(ranks, 2) if all_pairs else ring)
            links = [self._link(first, second, rules) for first, second in pairs]
            ports = dict.fromkeys(port for link in links for port in link.ports)
            self._routes[key] = Route(max(k.latency for k in links), min(k.bandwidth for k in links), tuple(ports))
        return self._routes[key]

    def _link(self, first: int, second: int, rules: tuple[LinkRule, ...]) -> Route:
        """Return the link between two ranks; a later rule overrides what earlier ones say."""
        latency, bandwidth, ports = 0.0, math.inf, ()
        per_node = self._conditions.ranks_per_node or 1
        nodes = first // per_node, second // per_node
        for rule in rules:
            if not _is_between(rule, (first, second), nodes):
                continue
            latency = latency if rule.latency is None else rule.latency
            if rule.bandwidth is not None:
                bandwidth = rule.bandwidth
                kind, ends = ("node", nodes) if rule.between == "across_nodes" else ("rank", (first, second))
                ports = tuple((kind, end) for end in ends)  # type: ignore[assignment]
        return Route(latency, bandwidth, ports)


def _is_between(rule: LinkRule, ranks: tuple[int, int], nodes: tuple[int, int]) -> bool:
    if isinstance(rule.between, tuple):
        return set(ranks) <= set(rule.between)
    return rule.between == "all" or (rule.between == "within_nodes") == (nodes[0] == nodes[1])


def volume(operation: str, ranks: int, size: int) -> tuple[float, int]:
    """Return (bytes, messages) that the slowest link carries one after the other; ``size``: what a rank hands over."""
    if operation in ("all_reduce", "agree", "barrier"):
        return 2.0 * (ranks - 1) / ranks * size, 2 * (ranks - 1)
    share = {"broadcast": 1.0, "broadcast_bytes": 1.0, "all_gather": ranks - 1.0, "gather": ranks - 1.0}
    return share.get(operation, (ranks - 1.0) / ranks) * size, ranks - 1
