"""The GPUs of a node's ranks: local ranks have them in turn, and share them where there are fewer than ranks.

Ranks that share a GPU take turns on it, which is for tests of several ranks on one card. They exchange tensors through
host memory; NCCL takes one rank per GPU, unless it takes them for different nodes (``nccl.py``).
"""

from __future__ import annotations

import sys

from hvdlm.io.launcher_env import Launch
from hvdlm.protocols.framework import Framework
from hvdlm_backends.horovod_support import HasHorovod


def select(framework: Framework, launch: Launch, nccl: bool = False) -> bool:
    """Make this rank's GPU the current one, if there are any, and warn on rank 0 where ranks share GPUs.

    Returns:
        Whether tensors on GPUs have to be sent from host memory. ``nccl``: NCCL sends them, which it does in any case.
    """
    gpus = framework.horovod.gpus if isinstance(framework, HasHorovod) else None
    count = gpus.count() if gpus else 0
    if not gpus or not count:
        return False
    gpus.bind(launch.local_rank)
    shared = count < launch.local_size
    if shared and launch.rank == 0:
        way = "NCCL's sockets" if nccl else "host memory"
        print(
            f"hvdlm: {launch.local_size} ranks share {count} GPU(s) on this node and exchange tensors through {way}, "
            "which is for tests: start one rank per GPU for speed.",
            file=sys.stderr,
            flush=True,
        )
    return shared and not nccl
