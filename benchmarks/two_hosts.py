"""Two hosts on this machine with a slow network between them: namespaces, a veth pair, token buckets.

Ranks start through ``mpirun --host`` as on two real nodes, with a script in place of ssh, and all their bytes pass an
interface whose counters can be read. Needs Linux, root and iproute2. Everything is removed in the end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import environment

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
NETWORK = "10.213.47"
BURST_SECONDS = 0.004  # for which the network may exceed its rate: a tick of the scheduler
# Starts a command on the other host as ssh would: AGENT HOST COMMAND...
_AGENT = """#!/bin/sh
shift
exec {inside} sh -c "$*"
"""


class Missing(Exception):
    """This machine can't have two hosts; the message names what it lacks."""


def check() -> None:
    """Raise Missing where rights or programs are missing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Missing("two hosts need network namespaces: run this as root on Linux, for example with sudo.")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if absent:
        raise Missing(f"two hosts need programs that are not installed here: install {' and '.join(absent)}.")
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    if tried.returncode:
        raise Missing(f"this user may not create network namespaces ({tried.stderr.strip()}): ask for CAP_SYS_ADMIN.")


class TwoHosts:
    """Both hosts and the network between them; ``two_hosts`` opens and closes it."""

    def __init__(self, folder: Path) -> None:
        self._agent = folder / "agent"
        self._names = [f"hvdlm-{os.getpid()}-{letter}" for letter in "ab"]
        self._interfaces = [f"hv{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = [f"{NETWORK}.{number}" for number in (1, 2)]

    def open(self) -> None:
        """Create the namespaces, the network between them and the script that starts commands on the second host."""
        first, second = self._interfaces
        for name in self._names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for name, interface, address in zip(self._names, self._interfaces, self.addresses, strict=True):
            _run("ip", "link", "set", interface, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _run("ip", "-n", name, "link", "set", interface, "mtu", "9000", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        self._agent.write_text(_AGENT.format(inside=shlex.join(self._inside(1, []))))
        self._agent.chmod(0o700)

    def _inside(self, number: int, command: Sequence[str]) -> list[str]:
        """Return ``command`` as run by host ``number``, under a host name of its own."""
        name = self._names[number]
        shell = ["sh", "-c", f'hostname {name}; exec "$@"', "-"]
        return ["ip", "netns", "exec", name, "unshare", "--uts", *shell, *command]

    def shape(self, rate: float) -> None:
        """Limit both directions to ``rate`` bits per second."""
        burst = max(65536, int(rate / 8 * BURST_SECONDS))
        for name, interface in zip(self._names, self._interfaces, strict=True):
            limits = ("rate", f"{rate:.0f}bit", "burst", str(burst), "latency", "100ms")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", interface, "root", "tbf", *limits)

    def sent(self) -> list[int]:
        """Return the bytes that each host has sent so far."""
        counts = []
        for name, interface in zip(self._names, self._interfaces, strict=True):
            path = f"/sys/class/net/{interface}/statistics/tx_bytes"
            counts.append(int(_run("ip", "netns", "exec", name, "cat", path)))
        return counts

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs ``python ARGUMENTS`` as one rank on each host."""
        mpirun = shutil.which("mpirun") or "mpirun"
        subnet = f"{NETWORK}.0/24"
        options = ["--prefix", str(Path(mpirun).resolve().parent.parent), "--host", f"{','.join(self.addresses)}"]
        options += ["-np", "2", "--bind-to", "none"]
        options += ["--mca", "plm_rsh_agent", str(self._agent), "--mca", "btl", "tcp,self"]
        options += ["--mca", "btl_tcp_if_include", subnet, "--mca", "oob_tcp_if_include", subnet]
        # Both hosts share the cores of this machine, which neither MPI nor hvdlm can see.
        options += ["--mca", "mpi_yield_when_idle", "1", "-x", "TF_CPP_MIN_LOG_LEVEL"]
        return self._inside(0, [mpirun, *options, sys.executable, *arguments])

    def run(self, arguments: Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS`` as one rank on each host."""
        command = self.command(arguments)
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)

    def close(self) -> None:
        """Remove everything that was created."""
        for name in self._names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> str:
    """Run a command; return its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Create the hosts, and remove them however the block ends.

    Raises:
        Missing: this machine can't have them.
    """
    check()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="hvdlm-hosts-") as folder:
        hosts = TwoHosts(Path(folder))
        try:
            hosts.open()
            yield hosts
        finally:
            hosts.close()
            signal.signal(signal.SIGTERM, before)
