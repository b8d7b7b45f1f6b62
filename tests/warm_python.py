"""A process that has imported a framework; commands of tests are forks of it, which start in a third of the time.

It imports what a run imports and computes nothing, so that a fork is in the state of a fresh process after its imports.
``python tests/warm_client.py`` stands for a command: it passes arguments, environment and files to this process,
forwards signals to the fork, and ends as the fork does. The fork ends with its client, and this process with its
standard input.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

# What most commands import; nothing that loads MPI.
COMMON = ["numpy", "ml_dtypes", "pluggy", "yaml", "safetensors.numpy", "tokenizers", "tensorboard.summary"]
COMMON += [
    "jsonargparse",
    "hvdlm.cli",
    "hvdlm.commands.train",
    "hvdlm.training.whole_run",
    "hvdlm.configuration.parsing",
]
FRAMEWORKS = {
    "none": [],
    "torch": ["torch", "hvdlm_torch.framework", "hvdlm_torch.trainable"],
    "tensorflow": ["tensorflow", "hvdlm_tensorflow.framework", "hvdlm_tensorflow.trainable"],
}
Request = dict[str, Any]


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """Return a client's request and its standard input, output and error."""
    files = array.array("i")
    size, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_LEN(3 * files.itemsize))
    for _, _, content in ancillary:
        files.frombytes(content)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "little"))), list(files)


def become(request: Request, files: list[int]) -> None:
    """Run the command of a request in this process, as ``python ARGUMENTS`` would."""
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    unbuffered = bool(request["environment"].get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0)
    sys.stdout = sys.__stdout__ = open(1, "w")
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    sys.stdout.reconfigure(write_through=unbuffered)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    sys.orig_argv = [sys.executable, *request["arguments"]]
    run(*request["arguments"])


def run(option: str, *rest: str) -> None:
    """Run ``-m MODULE``, ``-c CODE`` or a file as the main module."""
    if option == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = main_module = type(sys)("__main__")
        exec(compile(rest[0], "<string>", "exec"), main_module.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(option).resolve().parent), [option, *rest]
        runpy.run_path(option, run_name="__main__")


class Server:
    """Forks a process for every client; ``connections``: those of running forks, by process id."""

    def __init__(self, address: str) -> None:
        self.connections: dict[int, socket.socket] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.ended, writer = socket.socketpair()
        self.files = [self.listener, self.ended, writer]
        for end in (self.ended, writer):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno())
        self.selector = selectors.DefaultSelector()
        for file in (sys.stdin, self.listener, self.ended):
            self.selector.register(file, selectors.EVENT_READ)
        self.listener.bind(address)
        self.listener.listen(64)

    def serve(self) -> tuple[Request, list[int]] | None:
        """Return the request of a client in its fork, and nothing in this process when its standard input ends."""
        while True:
            for key, _ in self.selector.select(timeout=3600):
                if key.fileobj is sys.stdin:
                    for pid in self.connections:
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    request = self.fork()
                    if request is not None:
                        return request
                elif key.fileobj is self.ended:
                    self.report_ended()
                elif key.data in self.connections:
                    self.forward(key.data)

    def fork(self) -> tuple[Request, list[int]] | None:
        """Fork for the next client; return its request in the fork."""
        connection, _ = self.listener.accept()
        request, files = receive(connection)
        pid = os.fork()
        if pid:
            self.connections[pid] = connection
            self.selector.register(connection, selectors.EVENT_READ, pid)
            for file in files:
                os.close(file)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for file in (*self.files, connection, *self.connections.values()):
            file.close()
        return request, files

    def forward(self, pid: int) -> None:
        """Send a fork the signals that its client got; end it if its client has ended."""
        numbers = self.connections[pid].recv(16)
        for number in numbers or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not numbers:
            self.selector.unregister(self.connections[pid])

    def report_ended(self) -> None:
        """Send the clients of all forks that have ended their exit codes."""
        self.ended.recv(64)
        for pid in list(self.connections):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = self.connections.pop(pid)
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.send(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
                connection.close()


def main(address: str, framework: str) -> None:
    """Import what runs of a framework import, then fork for clients."""
    for name in COMMON + FRAMEWORKS[framework]:
        importlib.import_module(name)
    request = Server(address).serve()
    if request is not None:
        become(*request)


if __name__ == "__main__":
    main(*sys.argv[1:])
