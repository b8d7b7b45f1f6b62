"""Runs the generators of several tensors in lockstep: the requests of a round are fused into few collectives."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from keras import backend, ops

from hvdlm.protocols.compressor import Request
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression import tensor_ops
from hvdlm_compression.packing import Packing

Job = Generator[Request, list[Tensor], Tensor]


def dense(tensor: Tensor) -> Job:
    """Sum an uncompressed tensor."""
    return (yield Request("all_reduce", [tensor]))[0]


class Rounds:
    """Jobs of one bucket. The first round starts at once; ``advance`` ends a round and starts the next."""

    def __init__(self, group: Group, name: str, jobs: Sequence[Job]) -> None:
        self._group = group
        self._name = name
        self._jobs = list(jobs)
        self._number = 0
        self.results: list[Any] = [None] * len(jobs)
        self._received: dict[int, list[Tensor]] = {}
        self._collectives: list[_Collective] = []
        self._unfinished = list(range(len(jobs)))
        self._start_round()

    def advance(self) -> bool:
        """Wait for this round and start the next; return whether there is one."""
        if not self._unfinished:
            return False
        self._received = {}
        for collective in self._collectives:
            collective.collect(self._received)
        self._start_round()
        return bool(self._unfinished)

    def _start_round(self) -> None:
        """Send every job what it received, and start the collectives that the jobs request next."""
        requests: dict[int, Request] = {}
        for job in self._unfinished:
            try:
                received = self._received.get(job)
                requests[job] = next(self._jobs[job]) if received is None else self._jobs[job].send(received)
            except StopIteration as stop:
                self.results[job] = stop.value
        self._unfinished = list(requests)
        self._collectives = [
            kind(self._group, f"{self._name}.{self._number}.{index}", fused)
            for index, (kind, fused) in enumerate(_fused(requests))
        ]
        self._number += 1


def _fused(requests: dict[int, Request]) -> list[tuple[type[_Collective], dict[int, Request]]]:
    """Return the requests by collective: sums of one dtype, all that is gathered, and each all-to-all by itself."""
    collectives: dict[Any, tuple[type[_Collective], dict[int, Request]]] = {}
    for job, request in requests.items():
        if request.kind == "all_reduce":
            dtype = backend.standardize_dtype(request.tensors[0].dtype)
            collectives.setdefault(dtype, (_AllReduce, {}))[1][job] = request
        elif request.kind == "all_gather":
            collectives.setdefault("gather", (_AllGather, {}))[1][job] = request
        else:
            collectives[job] = (_AllToAll, {job: request})
    return list(collectives.values())


class _Collective:
    """One collective in flight, which serves the requests of one or several jobs."""

    def __init__(self, group: Group, name: str, requests: dict[int, Request]) -> None:
        self._requests = requests
        self._ranks = len(group.ranks)
        self._order = [(job, i) for job, request in requests.items() for i in range(len(request.tensors))]
        self._handle = self._start(group, name, [requests[job].tensors[i] for job, i in self._order])

    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        raise NotImplementedError

    def collect(self, received: dict[int, list[Tensor]]) -> None:
        """Wait, and store each job's tensors in ``received``."""
        raise NotImplementedError


class _AllReduce(_Collective):
    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        flat = [tensor_ops.reshape(tensor, (-1,)) for tensor in tensors]
        if len(flat) > 1:
            return group.all_reduce_async(ops.concatenate(flat), name)
        # Sums are in place in PyTorch, and a job may still need its tensor.
        (request,) = self._requests.values()
        return group.all_reduce_async(flat[0] if request.overwrites else ops.copy(flat[0]), name)

    def collect(self, received: dict[int, list[Tensor]]) -> None:
        fused = self._handle.wait()
        start = 0
        for job, i in self._order:
            shape = tuple(self._requests[job].tensors[i].shape)
            size = math.prod(shape)
            received.setdefault(job, []).append(tensor_ops.reshape(fused[start : start + size], shape))
            start += size


class _AllGather(_Collective):
    """Gathers all tensors as bytes."""

    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        rows = [ops.expand_dims(tensor, 0) for tensor in tensors]
        self._packing = Packing(rows)
        return group.all_gather_async(ops.reshape(self._packing.pack(rows), (-1,)), name)

    def collect(self, received: dict[int, list[Tensor]]) -> None:
        fused = ops.reshape(self._handle.wait(), (self._ranks, self._packing.bytes))
        for (job, _), tensor in zip(self._order, self._packing.unpack(fused), strict=True):
            received.setdefault(job, []).append(tensor)


class _AllToAll(_Collective):
    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        return group.all_to_all_async(tensors[0], name)

    def collect(self, received: dict[int, list[Tensor]]) -> None:
        for job, request in self._requests.items():
            shape = (self._ranks, request.tensors[0].shape[0] // self._ranks)
            received[job] = [ops.reshape(self._handle.wait(), shape)]
