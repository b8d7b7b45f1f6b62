"""The transport: every rank sends bytes under a key to rank 0, which sends those of all members back to each.

Nothing is pickled: a message is a JSON header, a zero byte, and raw bytes.
"""

import json
import queue
import threading
import time
from collections import Counter, defaultdict
from multiprocessing.connection import Client, Listener

from hvdlm.errors import RankError


class Hub:
    """Collects the bytes of all members under a key; runs in threads of rank 0."""

    def __init__(self, address, size):
        self._listener = Listener(address, "AF_UNIX", backlog=size)
        self._connections = {}
        self._contributions = defaultdict(dict)
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, args=(size,), daemon=True).start()

    def _accept(self, size):
        connections = [self._listener.accept() for _ in range(size)]
        self._listener.close()
        for connection in connections:
            self._connections[json.loads(connection.recv_bytes())] = connection
        for rank, connection in self._connections.items():
            threading.Thread(target=self._serve, args=(rank, connection), daemon=True).start()

    def _serve(self, rank, connection):
        try:
            while True:
                header, _, data = connection.recv_bytes().partition(b"\0")
                self._add(rank, header, data)
        except (EOFError, OSError):  # this rank has ended: the launcher or the watchdog ends the others
            return

    def _add(self, rank, header, data):
        members, _, _ = json.loads(header)
        with self._lock:
            self._contributions[header][rank] = data
            if len(self._contributions[header]) < len(members):
                return
            contributions = self._contributions.pop(header)
            of_ranks = [contributions[member] for member in members]
            lengths = json.dumps([len(bytes_of_rank) for bytes_of_rank in of_ranks]).encode()
            message = b"\0".join([header, lengths, b"".join(of_ranks)])
            for member in sorted(members, reverse=True):  # rank 0 last: it may end, with these threads, once it hears
                self._connections[member].send_bytes(message)


class Connection:
    """This rank's connection to the hub. Calls are matched by members, name and the number of calls of that name."""

    def __init__(self, address, rank, timeout):
        self._socket = _connect(address, timeout)
        self._socket.send_bytes(json.dumps(rank).encode())
        self._calls = Counter()
        self._results = defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()

    def send(self, members, name, data):
        """Send ``data``; return a function that waits for the bytes of all members, in their order."""
        with self._lock:
            call = (tuple(members), name)
            header = json.dumps([list(members), name, self._calls[call]]).encode()
            self._calls[call] += 1
            results = self._results[header]
            self._socket.send_bytes(header + b"\0" + data)
        return lambda: self._wait(header, results)

    def _wait(self, header, results):
        of_ranks = results.get()
        if of_ranks is None:
            raise RankError("backend template_backend: rank 0 has closed the connection.")
        del self._results[header]
        return of_ranks

    def _receive(self):
        try:
            while True:
                header, lengths, data = self._socket.recv_bytes().split(b"\0", 2)
                of_ranks, start = [], 0
                for length in json.loads(lengths):
                    of_ranks.append(data[start : start + length])
                    start += length
                self._results[header].put(of_ranks)
        except (EOFError, OSError):
            for results in list(self._results.values()):
                results.put(None)

    def close(self):
        """Close the connection."""
        self._socket.close()


def _connect(address, timeout):
    """Connect to the hub, which may not listen yet."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return Client(address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > deadline:
                raise RankError(f"backend template_backend: rank 0 does not listen at {address}: {error}.") from error
            time.sleep(0.02)
