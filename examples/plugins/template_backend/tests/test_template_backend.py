"""Tests the transport in one process, with a thread for each rank; the conformance suite tests the collectives."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from template_backend import hvdlm_make_backend
from template_backend.sockets import Connection, Hub

from hvdlm.errors import HvdlmError, RankError

RANKS = range(3)


@pytest.fixture
def connections(tmp_path):
    address = str(tmp_path / "socket")
    hub = Hub(address, len(RANKS))
    connections = [Connection(address, rank, 10.0) for rank in RANKS]
    yield connections
    for connection in connections:
        connection.close()
    del hub


def test_every_rank_receives_the_bytes_of_all(connections):
    with ThreadPoolExecutor(len(RANKS)) as threads:
        waits = [c.send(RANKS, "bytes", b"\0" * rank) for rank, c in zip(RANKS, connections, strict=True)]
        results = list(threads.map(lambda wait: wait(), waits))
    assert results == [[b"", b"\0", b"\0\0"]] * 3


def test_calls_in_different_orders_are_matched_by_name(connections):
    first, second = connections[:2]
    a1, b1 = first.send((0, 1), "a", b"a0"), first.send((0, 1), "b", b"b0")
    b2, a2 = second.send((0, 1), "b", b"b1"), second.send((0, 1), "a", b"a1")
    assert [a1(), b1(), a2(), b2()] == [[b"a0", b"a1"], [b"b0", b"b1"]] * 2


def test_a_rank_that_waits_learns_that_the_hub_has_gone(tmp_path):
    address = str(tmp_path / "socket")
    hub = Hub(address, 2)
    first, second = (Connection(address, rank, 10.0) for rank in range(2))
    wait = second.send((0, 1), "never", b"")
    first.send((0,), "served", b"")()  # the hub has accepted both
    with socket.socket(fileno=os.dup(hub._connections[1].fileno())) as hub_end:
        hub_end.shutdown(socket.SHUT_RDWR)
    with pytest.raises(RankError, match="rank 0 has closed the connection"):
        wait()


def test_ranks_on_several_machines_are_refused(monkeypatch):
    monkeypatch.setattr("hvdlm.io.launcher_env.launch_shape", lambda: (0, 4, 0, 2))
    with pytest.raises(HvdlmError, match="the ranks of one machine only"):
        hvdlm_make_backend(name="template_backend").launch_shape()
