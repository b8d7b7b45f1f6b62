"""Hosts on this machine with a slow network between them: namespaces, a bridge, token buckets.

Ranks start through ``mpirun --host`` as on real nodes, with a script in place of ssh, and all their bytes pass an
interface whose counters can be read. The link of every host to the bridge, which is in a namespace of its own, is
limited in both directions. Needs Linux, root and iproute2. Everything is removed in the end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from harness import environment, skip

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
NETWORK = "10.213.47"
BURST_SECONDS = 0.004  # for which the network may exceed its rate: a tick of the scheduler
INTERFACE = "hvdlm0"
"""The name of the network interface within every host."""
MOST = 16  # hosts
# Starts a command on a host as ssh would: AGENT HOST COMMAND...
_AGENT = """#!/bin/sh
host=$1
shift
case $host in
{cases}
esac
echo "unknown host $host" >&2
exit 1
"""
_CASE = '{address}) exec {inside} sh -c "$*" ;;'


class Missing(Exception):
    """This machine can't have hosts; the message names what it lacks."""


def skipped_without_hosts(main: Callable[[], None]) -> Callable[[], int]:
    """Return ``main`` with an exit code: 0, or where this machine can't have hosts, that of a skip, which says why."""

    @functools.wraps(main)
    def measured() -> int:
        try:
            main()
        except Missing as reason:
            return skip(str(reason))
        return 0

    return measured


def check() -> None:
    """Raise Missing where rights or programs are missing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Missing("hosts need network namespaces: run this as root on Linux, for example with sudo.")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if absent:
        raise Missing(f"hosts need programs that are not installed here: install {' and '.join(absent)}.")
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    if tried.returncode:
        raise Missing(f"this user may not create network namespaces ({tried.stderr.strip()}): ask for CAP_SYS_ADMIN.")


class Hosts:
    """The hosts and the network between them; ``open_hosts`` opens and closes it."""

    def __init__(self, folder: Path, count: int, per_host: int) -> None:
        self.count, self.ranks = count, count * per_host
        self._agent = folder / "agent"
        letters = [chr(ord("a") + number) for number in range(count)]
        self._names = [f"hvdlm-{os.getpid()}-{letter}" for letter in letters]
        self._bridge = f"hvdlm-{os.getpid()}-net"  # the bridge's namespace
        self._ports = [f"hv{os.getpid()}{letter}" for letter in letters]  # of the bridge
        self.addresses = [f"{NETWORK}.{number}" for number in range(1, count + 1)]

    def open(self) -> None:
        """Create the namespaces, the network between them and the script that starts commands on the hosts."""
        for name in (self._bridge, *self._names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", self._bridge, "link", "add", INTERFACE, "type", "bridge")
        _run("ip", "-n", self._bridge, "link", "set", INTERFACE, "mtu", "9000", "up")
        for name, port, address in zip(self._names, self._ports, self.addresses, strict=True):
            own = ("name", INTERFACE, "netns", name)
            _run("ip", "-n", self._bridge, "link", "add", port, "type", "veth", "peer", *own)
            _run("ip", "-n", self._bridge, "link", "set", port, "master", INTERFACE, "mtu", "9000", "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "mtu", "9000", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        hosts = enumerate(self.addresses)
        cases = [_CASE.format(address=address, inside=shlex.join(self._inside(i, []))) for i, address in hosts]
        self._agent.write_text(_AGENT.format(cases="\n".join(cases)))
        self._agent.chmod(0o700)

    def _inside(self, number: int, command: Sequence[str]) -> list[str]:
        """Return ``command`` as run by host ``number``, under a host name of its own."""
        name = self._names[number]
        shell = ["sh", "-c", f'hostname {name}; exec "$@"', "-"]
        return ["ip", "netns", "exec", name, "unshare", "--uts", *shell, *command]

    def shape(self, rate: float) -> None:
        """Limit both directions of every host's link to ``rate`` bits per second."""
        burst = max(65536, int(rate / 8 * BURST_SECONDS))
        limits = ("rate", f"{rate:.0f}bit", "burst", str(burst), "latency", "100ms")
        ends = [(name, INTERFACE) for name in self._names] + [(self._bridge, port) for port in self._ports]
        for name, interface in ends:
            _run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", interface, "root", "tbf", *limits)

    def sent(self) -> list[int]:
        """Return the bytes that each host has sent so far."""
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return [int(_run("ip", "netns", "exec", name, "cat", path)) for name in self._names]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs ``python ARGUMENTS`` on all ranks."""
        mpirun = shutil.which("mpirun") or "mpirun"
        subnet = f"{NETWORK}.0/24"
        per_host = self.ranks // self.count
        options = ["--prefix", str(Path(mpirun).resolve().parent.parent)]
        options += ["--host", ",".join(f"{address}:{per_host}" for address in self.addresses)]
        options += ["-np", str(self.ranks), "--bind-to", "none"]
        options += ["--mca", "plm_rsh_agent", str(self._agent), "--mca", "plm_rsh_no_tree_spawn", "1"]
        options += ["--mca", "btl", "tcp,self,vader" if per_host > 1 else "tcp,self"]  # vader: memory of one host
        options += ["--mca", "btl_tcp_if_include", subnet, "--mca", "oob_tcp_if_include", subnet]
        # The hosts share the cores of this machine, which neither MPI nor hvdlm can see.
        options += ["--mca", "mpi_yield_when_idle", "1", "-x", "TF_CPP_MIN_LOG_LEVEL"]
        return self._inside(0, [mpirun, *options, sys.executable, *arguments])

    def run(
        self, arguments: Sequence[str], timeout: float = 600, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS`` on all ranks, with these environment variables."""
        command, env = self.command(arguments), {**environment(), **(variables or {})}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)

    def close(self) -> None:
        """Remove everything that was created."""
        for name in (*self._names, self._bridge):
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
def open_hosts(count: int = 2, per_host: int = 1) -> Iterator[Hosts]:
    """Create ``count`` hosts, 2 to 16, for ``per_host`` ranks each, and remove them however the block ends.

    Raises:
        Missing: this machine can't have them.
    """
    assert 2 <= count <= MOST
    check()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="hvdlm-hosts-") as folder:
        hosts = Hosts(Path(folder), count, per_host)
        try:
            hosts.open()
            yield hosts
        finally:
            hosts.close()
            signal.signal(signal.SIGTERM, before)
