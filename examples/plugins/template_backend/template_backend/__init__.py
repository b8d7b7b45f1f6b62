"""Template of a backend: the ranks of one machine, connected by a Unix socket; rank 0 has the hub.

Copy this folder, rename template_backend everywhere, and replace ``sockets.py`` by your transport. This module imports
neither a framework nor a transport: their environment variables are set by ``prepare``, which is called later.
"""

import hashlib
import tempfile
from pathlib import Path

from hvdlm import hookimpl
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env


class Backend:
    """The backend ``template_backend``."""

    name = "template_backend"

    def launch_shape(self):
        """Return (rank, size, local rank, local size); without a launcher, those of a single process."""
        shape = launcher_env.launch_shape()
        if shape[1] != shape[3]:
            raise HvdlmError("backend template_backend connects the ranks of one machine only: use --backend mpi4py.")
        return shape

    def prepare(self, config):
        """Set thread counts in the environment; return the threads per rank."""
        from hvdlm_backends import environment

        return environment.prepare(launcher_env.detect(), config)

    def start(self, framework, groups, config):
        """Connect the ranks; ``groups``: all sets of ranks that will be used."""
        from hvdlm_backends.local import LocalWorld

        if launcher_env.detect() is None:
            return LocalWorld()
        from template_backend.world import SocketWorld

        return SocketWorld(self.launch_shape(), _address(), groups, framework, config.communication.timeout)


def _address():
    """Return the path of a socket of this launch."""
    launch = launcher_env.launch_identity()
    if not launch:
        raise HvdlmError("backend template_backend: the launcher doesn't name the launch: use mpirun or srun.")
    name = hashlib.sha256(f"{launch} {Path.home()}".encode()).hexdigest()[:16]
    return str(Path(tempfile.gettempdir()) / f"hvdlm-{name}.socket")


@hookimpl
def hvdlm_make_backend(name):
    """Return the backend; None for another name."""
    return Backend() if name == "template_backend" else None
