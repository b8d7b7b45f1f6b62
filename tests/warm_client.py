"""``python -I -S tests/warm_client.py ADDRESS ARGUMENTS``: ``python ARGUMENTS`` as a fork (see warm_python.py)."""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")


def start() -> socket.socket:
    """Send the server what the fork needs; return the connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
    request |= {"cores": sorted(os.sched_getaffinity(0)), "umask": os.umask(0)}
    os.umask(request["umask"])
    data = json.dumps(request).encode()
    files = array.array("i", [0, 1, 2])
    connection.sendmsg([len(data).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(data)
    return connection


def main() -> None:
    """Wait for the fork and end as it does."""
    connection = start()
    for name in FORWARDED:
        signal.signal(getattr(signal, name), lambda number, _: connection.send(bytes([number])))
    answer = connection.recv(4)
    if not answer:
        sys.exit("the process that has imported the framework for tests has ended (tests/warm_python.py)")
    code = int.from_bytes(answer, "little", signed=True)
    if code < 0:  # by a signal
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
