"""Processes that have imported a framework; commands of tests are forks of them, which start in less time.

They import what a run imports, make the parser of its options and compute nothing, so that a fork is in the state of a
fresh process that has done that.
The process that was started for a command (sitecustomize.py) passes on its arguments, environment and files, forwards
signals to the fork and ends as it does. Where it is on a host of its own (network namespace, host name), the fork
enters that first. The fork ends with that process, and the servers with their standard input.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, NoReturn

import packages

# What most commands import, and nothing that loads MPI. Programs that change what hvdlm has change attributes of its
# modules, which are looked up when they are used: it makes no difference that other modules have been imported before.
COMMON = ["numpy", "ml_dtypes", "pluggy", "yaml", "jsonargparse", "safetensors.numpy", "tokenizers", "psutil", "tqdm"]
COMMON += ["tensorboard.summary", "docstring_parser", "attrs", "pydoc_data.topics", "statistics", "http.server"]
COMMON += ["pytest", "numpy.testing"]  # which runs tests on every rank of launches
COMMON += ["hvdlm.cli", "hvdlm.configuration.parsing", "hvdlm.commands.train", "hvdlm_diagnosis.diagnosis"]
TRAINING = ["hvdlm.training.whole_run", "hvdlm.communication.all_reduce", "hvdlm.diagnostics.rank_errors", "numpy.ma"]
TRAINING += [f"hvdlm_backends.{name}" for name in ("threads_command", "local", "horovod", "mpi", "mpi4py")]
TRAINING += [f"hvdlm_language.{name}" for name in ("language_model", "gpt", "presets")]
TRAINING += ["hvdlm_corpora.plugin", "hvdlm_corpora.preparer", "hvdlm_diagnosis.hangs", "packaging.version"]
TRAINING += [f"hvdlm_planner.{name}" for name in ("advice", "grading", "habits")]
TRAINING += [
    f"hvdlm_telemetry.{n}" for n in ("changed_rate", "computation", "metrics", "peaks", "progress", "tensorboard")
]
FRAMEWORKS = {
    "none": [],
    "torch": [
        "torch",
        "torch._dynamo.backends.debugging",
        "keras",
        *TRAINING,
        "hvdlm_torch.plugin",
        "hvdlm_torch.framework",
    ],
    "tensorflow": ["tensorflow", "keras", *TRAINING, "hvdlm_tensorflow.plugin", "hvdlm_tensorflow.framework"],
    "jax": ["jax", "keras", *TRAINING, "hvdlm_jax.plugin", "hvdlm_jax.framework"],  # where jax.json says (launching.py)
}
MOST_FILES = 6
ROOT = str(Path(__file__).resolve().parent.parent.parent)
Request = tuple[dict[str, Any], list[int]]


def receive(connection: socket.socket) -> Request:
    """Return a command's request and its files: standard input, output and error, and the namespaces of its host.

    Waits for it at most ten seconds.
    """
    connection.settimeout(10)
    files = array.array("i")
    size, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_LEN(MOST_FILES * files.itemsize))
    for _, _, content in ancillary:
        files.frombytes(content)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "little"))), list(files)


def become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run a command in this process and end it, as ``python ARGUMENTS`` would."""
    for target, file in enumerate(files[:3]):
        os.dup2(file, target)
        os.close(file)
    for file in files[3:]:
        if ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), "the fork can't enter the host of its command")
        os.close(file)
    sys.path[1:1] = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    sys.stdin = sys.__stdin__ = open(0)
    sys.stdout = sys.__stdout__ = open(1, "w")
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    sys.stdout.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.orig_argv = [sys.executable, *request["arguments"]]
    phases: Any = sys.modules["hvdlm.diagnostics.phases"]
    vars(phases.process).update(_of_process=phases.Process())  # which has the rank and the time of its start
    code: Any = None
    try:
        run(*request["arguments"])
    except SystemExit as ended:
        code = ended.code
    end(code)


def end(code: Any) -> NoReturn:
    """End this process as ``sys.exit(code)`` does, without taking all modules apart, which takes 0.1 to 0.6 s."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # as mpi4py does when the interpreter is finalized
    code = (code or 0) & 0xFF
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            code = 120
    os._exit(code)


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
    """Forks a process for every command; ``connections``: those of running forks, by process id."""

    def __init__(self, listener: socket.socket) -> None:
        self.connections: dict[int, socket.socket] = {}
        self.listener = listener
        self.ended, self.writer = socket.socketpair()
        for end in (self.ended, self.writer):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.writer.fileno())
        self.selector = selectors.DefaultSelector()
        for file in (sys.stdin, self.listener, self.ended):
            self.selector.register(file, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Return the request of a command in its fork, and nothing in this process when its standard input ends."""
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

    def fork(self) -> Request | None:
        """Fork for the next command; return its request in the fork."""
        connection, _ = self.listener.accept()
        try:
            request = receive(connection)
        except (OSError, ValueError):  # its process was killed meanwhile
            connection.close()
            return None
        pid = os.fork()
        connection.settimeout(None)
        if pid:
            self.connections[pid] = connection
            self.selector.register(connection, selectors.EVENT_READ, pid)
            for file in request[1]:
                os.close(file)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for file in (self.listener, self.ended, self.writer, connection, *self.connections.values()):
            file.close()
        return request

    def forward(self, pid: int) -> None:
        """Send a fork the signals that its command's process got; end it if that has ended."""
        try:
            numbers = self.connections[pid].recv(16)
        except ConnectionResetError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not numbers:
            self.selector.unregister(self.connections[pid])

    def report_ended(self) -> None:
        """Pass on the exit codes of all forks that have ended."""
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


def start_servers(folder: Path) -> tuple[str, socket.socket] | None:
    """Fork a server when a framework is first asked for; return its framework and socket in the fork.

    Returns nothing in this process, when its standard input ends.
    """
    listeners = {}
    for framework in FRAMEWORKS:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / framework))
        listener.listen(64)
        listeners[framework] = listener
    (folder / "ready").touch()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        for framework, listener in listeners.items():
            selector.register(listener, selectors.EVENT_READ, framework)
        while True:
            for key, _ in selector.select(timeout=3600):
                if key.fileobj is sys.stdin:
                    return None
                selector.unregister(key.fileobj)
                if not os.fork():
                    return key.data, listeners[key.data]
                listeners.pop(key.data).close()  # if the server dies, commands are refused, and start afresh


def main(folder: str) -> None:
    """Serve until standard input ends."""
    started = start_servers(Path(folder))
    if started is None:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()  # servers end with standard input, too; whoever waits for this process has their CPU time
        return
    framework, listener = started
    settings = Path(folder, f"{framework}.json")
    if settings.exists():
        os.environ.update(json.loads(settings.read_text()))
        sys.path[1:1] = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["KERAS_BACKEND"] = framework  # read by keras at its import; a fork has its command's environment
    for name in COMMON + FRAMEWORKS[framework]:
        importlib.import_module(name)
    packages.remember()
    own, sys.path[0] = sys.path[0], ROOT
    importlib.metadata.entry_points(group="hvdlm")  # for commands that are started there
    sys.path[0] = own
    parsing: Any = sys.modules["hvdlm.configuration.parsing"]
    parsing.config_parser("[train]", ())  # it is kept; making one takes 0.05 s
    if "torch._dynamo.utils" in sys.modules:  # it would format the times of compilations, for a log that isn't written
        atexit.unregister(sys.modules["torch._dynamo.utils"].dump_compile_times)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # torch's operators would be taken apart when a fork ends, for 0.06 s
    gc.collect()
    gc.freeze()  # else collections of every fork go through all that was imported, and copy its pages: 0.6 to 1 s
    gc.set_threshold(50_000, 20, 20)  # what a fork makes in its first steps stays: collections only look through it
    request = Server(listener).serve()
    if request is not None:
        become(*request)


if __name__ == "__main__":
    main(*sys.argv[1:])
