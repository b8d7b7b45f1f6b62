"""Python imports this file at its start: what trains a model continues as a fork of a process that is warm.

``HVDLM_TEST_WARM`` names the folder of the sockets of server.py; without it, nothing is done. Processes in which the
environment says otherwise what Python, its libraries or a framework read when they are loaded, stay fresh.
"""

import os
import sys

READ_ONCE = ("PYTHON", "LD_", "LC_", "LANG", "KMP_", "TF_", "XLA_", "MALLOC_", "TORCH", "PYTORCH")
# The former are read at the first operation, and a fork extends its path by the latter.
NOT_READ = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PYTHONPATH")
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")
FRAMEWORKS = ("torch", "tensorflow")


def framework(arguments: list) -> str:
    """Return the framework that a command imports, "none" for a command of hvdlm that imports none, else ""."""
    name = os.environ.get("HVDLM_TEST_FRAMEWORK", "") if arguments[:2] == ["-m", "pytest"] else ""
    if "--framework" in arguments[:-1]:
        name = arguments[arguments.index("--framework") + 1]
    elif arguments[:2] == ["-m", "hvdlm"]:
        name = default_framework(arguments[2:])
    return name if name in FRAMEWORKS else "none" if arguments[:2] == ["-m", "hvdlm"] else ""


def default_framework(arguments: list) -> str:
    """Return the framework of a command of hvdlm that names none, if it imports one."""
    computes = arguments[:1] in (["train"], ["generate"], ["evaluate"]) or (arguments[0:1] and arguments[0][:2] == "--")
    if not computes or {"--help", "-h", "--dry_run", "--version"} & set(arguments):
        return ""
    for option, file in (("--config", ""), ("--run", "config.yaml")):
        if option in arguments[:-1]:
            path = os.path.join(arguments[arguments.index(option) + 1], file).rstrip("/")
            try:
                with open(path) as stream:
                    lines = [line.split(":")[1].strip() for line in stream if line.startswith("framework:")]
            except (OSError, ValueError):
                return ""
            return lines[0] if lines else "torch"
    return "torch"


def read_once(environment: dict) -> dict:
    """Return the environment variables that are read when Python, its libraries or a framework are loaded."""
    return {n: value for n, value in environment.items() if n.startswith(READ_ONCE) and n not in NOT_READ}


def continue_as_fork(folder: str, arguments: list) -> None:
    """Pass this process to a server, forward signals to the fork, and end as it does."""
    import array
    import json
    import signal
    import socket

    with open(os.path.join(folder, "environment.json")) as file:
        if read_once(json.load(file)) != read_once(dict(os.environ)):
            return
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.path.join(folder, framework(arguments)))
    except ConnectionRefusedError:  # the server has died
        return
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    request |= {"cores": sorted(os.sched_getaffinity(0)), "umask": os.umask(0), "pid": os.getpid()}
    os.umask(request["umask"])
    data = json.dumps(request).encode()
    files = array.array("i", [0, 1, 2])
    connection.sendmsg([len(data).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(data)
    for name in FORWARDED:
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), lambda number, _: connection.send(bytes([number])))
    code = int.from_bytes(connection.recv(4) or b"\1", "little", signed=True)
    if code < 0:  # by a signal
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


_FOLDER = os.environ.get("HVDLM_TEST_WARM")
if _FOLDER and len(sys.orig_argv) > 1 and framework(sys.orig_argv[1:]):
    continue_as_fork(_FOLDER, sys.orig_argv[1:])
