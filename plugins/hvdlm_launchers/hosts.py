"""Host discovery: which hosts a run can be started on now, and on how many ranks.

Hosts come from a script such as ``horovodrun --host-discovery-script`` takes; hosts that are unreachable are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import make_mesh

PROBE = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true"
"""Default command that checks whether a host is reachable: exit code 0."""

# ASCII alone, and no leading dash: a host must not become an option.
_LINE = re.compile(r"([A-Za-z0-9_][\w.-]*)(?::(\d{1,6}))?", re.ASCII)
_LOCAL = ("localhost", "127.0.0.1")


class NoHosts(Exception):
    """The hosts can't be determined now, or are too few; a later attempt may succeed. Carries the reason."""


def script(text: str) -> list[str]:
    """Return the words of the command for a host-discovery script, given as a file or as a file with arguments.

    Raises:
        HvdlmError: there is no such program.
    """
    words = [text] if shutil.which(text) else shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise HvdlmError(
            f"--host_discovery_script {text}: there is no such program: name an executable file (chmod +x) that prints "
            "a line host:slots for every host."
        )
    return words


def discover(words: list[str], slots: int | None, timeout: float = 30.0) -> dict[str, int]:
    """Return {host: slots} as the script prints them; hosts printed without slots get ``slots``.

    Raises:
        NoHosts: the script failed, took longer than ``timeout`` seconds or printed something else.
    """
    with tempfile.TemporaryFile() as output:  # not a pipe, which the script's children could hold open
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True)
        except OSError as error:
            raise NoHosts(f"the host-discovery script could not be started ({error.strerror})") from error
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NoHosts(f"the host-discovery script took longer than {timeout:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            raise NoHosts(f"the host-discovery script ended with code {code}")
        output.seek(0)
        lines = output.read(2**20).decode(errors="replace").splitlines()
    return dict(_parse_line(line.strip(), slots) for line in lines if line.strip())


def _parse_line(line: str, default_slots: int | None) -> tuple[str, int]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise NoHosts(f"the host-discovery script printed {line[:80]!r}, expected host:slots")
    host, slots = match.groups()
    if slots is not None:
        return host, int(slots)
    if default_slots is None:
        raise NoHosts(f"the host-discovery script printed {line[:80]!r} without slots: give --slots_per_host")
    return host, default_slots


def reachable(hosts: Mapping[str, int], probe: str, timeout: float = 15.0) -> dict[str, int]:
    """Return the hosts for which ``probe`` ends with code 0, all probed at once; this machine is always reachable."""
    name = socket.gethostname()
    local = {*_LOCAL, name, name.partition(".")[0]}

    def responds(host: str) -> bool:
        if host in local:
            return True
        words = [word.replace("{host}", host) for word in shlex.split(probe)]
        null = subprocess.DEVNULL
        try:
            return subprocess.run(words, timeout=timeout, stdin=null, stdout=null, stderr=null).returncode == 0
        except (subprocess.TimeoutExpired, OSError):
            return False

    with ThreadPoolExecutor(min(64, max(1, len(hosts)))) as pool:
        responses = list(pool.map(responds, hosts))
    return {host: slots for (host, slots), up in zip(hosts.items(), responses, strict=True) if up and slots > 0}


def usable_ranks(slots: int, config: Config | None, minimum: int) -> int:
    """Return the largest number of ranks, at most ``slots``, that the layout of ``config`` divides into.

    Raises:
        NoHosts: that would be fewer than ``minimum``; the sentence says why.
    """
    reason = f"there are slots for {slots} rank(s), --min_ranks asks for {minimum}"
    for count in range(slots, minimum - 1, -1):
        try:
            if config is not None:
                _check_layout(config, count)
        except HvdlmError as error:
            reason = str(error)
            continue
        return count
    raise NoHosts(reason)


def _check_layout(config: Config, count: int) -> None:
    mesh = make_mesh(count, config.parallel)
    validation.layout(config, mesh)
    if config.communication.reduction == "adasum" and count & (count - 1):
        raise HvdlmError(f"communication.reduction adasum needs a power of two, not {count} ranks.")
