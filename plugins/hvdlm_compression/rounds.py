"""Runs the generators of several tensors in lockstep: all requests of a round travel as few fused collectives."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from keras import backend, ops

from hvdlm.protocols.compressor import Request
from hvdlm.protocols.group import Group, Handle
from hvdlm.protocols.types import Tensor
from hvdlm_compression.base import itemsize

Job = Generator[Request, list[Tensor], Tensor]


def dense(tensor: Tensor) -> Job:
    """Sum a tensor as it is."""
    return (yield Request("all_reduce", [tensor]))[0]


class Rounds:
    """Jobs of one bucket. The first round starts at once; ``advance`` ends a round and starts the next."""

    def __init__(self, group: Group, name: str, jobs: Sequence[Job]) -> None:
        self._group, self._name, self._jobs = group, name, list(jobs)
        self._number = 0
        self.results: list[Any] = [None] * len(jobs)
        self._answers: dict[int, list[Tensor]] = {}
        self._sent: list[_Sent] = []
        self._asking = list(range(len(jobs)))
        self._ask()

    def advance(self) -> bool:
        """Wait for this round and start the next; return whether there is one."""
        if not self._asking:
            return False
        self._answers = {}
        for sent in self._sent:
            sent.collect(self._answers)
        self._ask()
        return bool(self._asking)

    def _ask(self) -> None:
        """Hand every job its answer and start what they request next."""
        requests: dict[int, Request] = {}
        for job in self._asking:
            try:
                answer = self._answers.get(job)
                requests[job] = next(self._jobs[job]) if answer is None else self._jobs[job].send(answer)
            except StopIteration as stop:
                self.results[job] = stop.value
        self._asking = list(requests)
        self._sent = [sent(self._group, self._prefix(i), part) for i, (sent, part) in enumerate(_sorted(requests))]
        self._number += 1

    def _prefix(self, part: int) -> str:
        return f"{self._name}.{self._number}.{part}"


def _sorted(requests: dict[int, Request]) -> list[tuple[type[_Sent], dict[int, Request]]]:
    """Return what travels together: sums of one dtype, everything that is gathered, each all-to-all by itself."""
    found: dict[Any, tuple[type[_Sent], dict[int, Request]]] = {}
    for job, request in requests.items():
        if request.kind == "all_reduce":
            dtype = backend.standardize_dtype(request.tensors[0].dtype)
            found.setdefault(dtype, (_Sums, {}))[1][job] = request
        elif request.kind == "all_gather":
            found.setdefault("gather", (_Gathered, {}))[1][job] = request
        else:
            found[job] = (_Parts, {job: request})
    return list(found.values())


class _Sent:
    """One collective under way."""

    def __init__(self, group: Group, name: str, requests: dict[int, Request]) -> None:
        self._requests, self._ranks = requests, len(group.ranks)
        self._order = [(job, i) for job, request in requests.items() for i in range(len(request.tensors))]
        self._handle = self._start(group, name, [requests[job].tensors[i] for job, i in self._order])

    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        raise NotImplementedError

    def collect(self, answers: dict[int, list[Tensor]]) -> None:
        """Wait, and put every job's answer into ``answers``."""
        raise NotImplementedError


class _Sums(_Sent):
    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        flat = [ops.reshape(tensor, (-1,)) for tensor in tensors]
        # Horovod sums in place in PyTorch: what a job keeps must not change.
        return group.all_reduce_async(ops.concatenate(flat) if len(flat) > 1 else ops.copy(flat[0]), name)

    def collect(self, answers: dict[int, list[Tensor]]) -> None:
        whole, start = self._handle.wait(), 0
        for job, i in self._order:
            shape = tuple(self._requests[job].tensors[i].shape)
            size = _size(shape)
            answers.setdefault(job, []).append(ops.reshape(whole[start : start + size], shape))
            start += size


class _Gathered(_Sent):
    """Everything as bytes; the widest elements first, so that each tensor's bytes begin where its dtype can."""

    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        widths = {place: itemsize(self._requests[place[0]].tensors[place[1]]) for place in self._order}
        self._order.sort(key=lambda place: -widths[place])
        ordered = [self._requests[job].tensors[i] for job, i in self._order]
        parts = [ops.view(ops.reshape(tensor, (-1,)), "uint8") for tensor in ordered]
        self._bytes = sum(part.shape[0] for part in parts)
        self._padding = -self._bytes % 4
        if self._padding:
            parts.append(ops.zeros((self._padding,), "uint8"))
        return group.all_gather_async(ops.concatenate(parts) if len(parts) > 1 else parts[0], name)

    def collect(self, answers: dict[int, list[Tensor]]) -> None:
        whole = ops.reshape(self._handle.wait(), (self._ranks, self._bytes + self._padding))
        start = 0
        found = {}
        for job, i in self._order:
            tensor = self._requests[job].tensors[i]
            shape, dtype = tuple(tensor.shape), backend.standardize_dtype(tensor.dtype)
            stop = start + _size(shape) * itemsize(tensor)
            part = whole[:, start:stop]
            typed = part if dtype == "uint8" else ops.view(part, dtype)
            found[job, i] = ops.reshape(typed, (self._ranks, *shape))
            start = stop
        for job, request in self._requests.items():
            answers[job] = [found[job, i] for i in range(len(request.tensors))]


class _Parts(_Sent):
    def _start(self, group: Group, name: str, tensors: list[Tensor]) -> Handle:
        return group.all_to_all_async(tensors[0], name)

    def collect(self, answers: dict[int, list[Tensor]]) -> None:
        for job, request in self._requests.items():
            answers[job] = [ops.reshape(self._handle.wait(), (self._ranks, request.tensors[0].shape[0] // self._ranks))]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
