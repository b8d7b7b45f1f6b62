"""Compares settings between ranks of ``horovodrun --gloo`` before they are connected, through the launcher's server.

The launcher serves the addresses by which Gloo's ranks find each other: a store of values by name, over HTTP.
"""

from __future__ import annotations

import json
import time
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from hvdlm.io import launcher_env
from hvdlm_backends import environment

_REQUEST_SECONDS = 10.0
_PAUSE_SECONDS = 0.2
_MAX_BYTES = 1 << 20


def check_settings(rank: int) -> None:
    """Compare Horovod's settings with rank 0's, which is waited for. All ranks call.

    Only rank 0's are read: if every rank read all, a large launch would need as many requests as it has pairs of ranks.

    Raises:
        HvdlmError: they differ.
    """
    own = environment.shared_settings()
    try:
        if rank == 0:
            _request("PUT", own)
            return
        while (first := _request("GET")) is None:
            time.sleep(_PAUSE_SECONDS)
    except OSError:
        return  # Horovod reports a server that doesn't respond
    environment.compare_with_first(rank, json.loads(own), json.loads(first))


def _request(method: str, data: bytes | None = None) -> bytes | None:
    """Send a request to the server; return its answer, None where it has no such value yet."""
    address, port = launcher_env.gloo_rendezvous()
    host = f"[{address}]" if ":" in address else address
    request = Request(f"http://{host}:{port}/hvdlm.settings/0", data=data, method=method)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_REQUEST_SECONDS) as answer:
            return answer.read(_MAX_BYTES)
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
