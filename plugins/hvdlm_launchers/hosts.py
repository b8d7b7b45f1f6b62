"""Which hosts a run can be started on now, and on how many ranks.

Hosts come from a script, as ``horovodrun --host-discovery-script`` takes it; those that don't answer are left out.
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
"""What asks a host whether it answers: exit code 0."""

_LINE = re.compile(r"([A-Za-z0-9_][\w.-]*)(?::(\d{1,6}))?")  # no leading dash: a host must not become an option
_LOCAL = ("localhost", "127.0.0.1")


class NoHosts(Exception):
    """No hosts could be found out now, with the reason; they may come."""


def script(text: str) -> list[str]:
    """Return the words of a host-discovery script: a file, or a file with arguments.

    Raises:
        HvdlmError: it can't be started.
    """
    words = [text] if shutil.which(text) else shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise HvdlmError(
            f"--host_discovery_script {text}: there is no such program: name a file that may be executed (chmod +x) "
            "and prints a line host:slots for every host."
        )
    return words


def discover(words: list[str], slots: int | None, timeout: float = 30.0) -> dict[str, int]:
    """Return {host: slots} as the script prints them; ``slots`` of hosts that are printed without.

    Raises:
        NoHosts: the script failed, took longer than ``timeout`` seconds or printed something else.
    """
    with tempfile.TemporaryFile() as output:  # not a pipe, which the script's children could hold open
        try:
            asked = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True)
        except OSError as error:
            raise NoHosts(f"the host-discovery script could not be started ({error.strerror})") from error
        try:
            code = asked.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NoHosts(f"the host-discovery script took longer than {timeout:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(asked.pid, signal.SIGKILL)
            asked.wait()
        if code:
            raise NoHosts(f"the host-discovery script ended with code {code}")
        output.seek(0)
        lines = output.read(2**20).decode(errors="replace").splitlines()
    return dict(_host(line.strip(), slots) for line in lines if line.strip())


def _host(line: str, slots: int | None) -> tuple[str, int]:
    found = _LINE.fullmatch(line)
    if not found:
        raise NoHosts(f"the host-discovery script printed {line[:80]!r}, expected host:slots")
    if found[2] is None and slots is None:
        raise NoHosts(f"the host-discovery script printed {line[:80]!r} without slots: give --slots_per_host")
    return found[1], int(found[2]) if found[2] is not None else slots or 0


def answering(hosts: Mapping[str, int], probe: str, timeout: float = 15.0) -> dict[str, int]:
    """Return those of ``hosts`` that answer ``probe``, all asked at once; this machine always does."""
    here = socket.gethostname()
    local = {*_LOCAL, here, here.partition(".")[0]}

    def answers(host: str) -> bool:
        if host in local:
            return True
        words = [word.replace("{host}", host) for word in shlex.split(probe)]
        null = subprocess.DEVNULL
        try:
            return subprocess.run(words, timeout=timeout, stdin=null, stdout=null, stderr=null).returncode == 0
        except (subprocess.TimeoutExpired, OSError):
            return False

    with ThreadPoolExecutor(min(64, max(1, len(hosts)))) as pool:
        said = list(pool.map(answers, hosts))
    return {host: slots for (host, slots), yes in zip(hosts.items(), said, strict=True) if yes and slots > 0}


def ranks(slots: int, config: Config | None, least: int) -> int:
    """Return the largest number of ranks, at most ``slots``, that a run with ``config`` can be cut into.

    Raises:
        NoHosts: not even ``least`` ranks can be had; the sentence tells why.
    """
    reason = f"there are slots for {slots} rank(s), --min_ranks asks for {least}"
    for count in range(slots, least - 1, -1):
        try:
            if config is not None:
                _fits(config, count)
        except HvdlmError as error:
            reason = str(error)
            continue
        return count
    raise NoHosts(reason)


def _fits(config: Config, count: int) -> None:
    mesh = make_mesh(count, config.parallel)
    validation.layout(config, mesh)
    if config.communication.reduction == "adasum" and count & (count - 1):
        raise HvdlmError(f"communication.reduction adasum needs a power of two, not {count} ranks.")
