"""Finds the cause of a failed build in its output, and what to do: compiler error, disk, network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_WITHOUT = "or train without Horovod: --backend mpi4py needs no compiler"
_MEMORY = f"The compiler ran out of memory: set MAKEFLAGS=-j1 and try again, {_WITHOUT}."
_NETWORK = "Check the network and pip's settings (pip config list: index-url, proxy); nothing was installed."


class Kind(NamedTuple):
    """A class of failures: the lines of a log that show it, and what to do about it."""

    pattern: str
    advice: str


# Searched for in the whole output, in this order: an earlier one is the cause of later ones.
ENVIRONMENT = (
    Kind(
        r"No space left on device|Disk quota exceeded",
        "The disk is full: free some space, or set TMPDIR and XDG_CACHE_HOME to folders on a larger disk.",
    ),
    Kind(
        r"fatal error: Killed signal|virtual memory exhausted|(?:cc1plus|LLVM ERROR|nvcc).*: out of memory|"
        r"throwing an instance of 'std::bad_alloc'",
        _MEMORY,
    ),
)
# Formats of errors of compilers, CMake, linkers and nvcc; the first match in the output is the cause. pip indents a
# build's output.
ERRORS = (
    r"^ *(?P<file>[^\s:()]+):(?P<line>\d+):(?:\d+:)? (?:fatal |internal compiler )?error: (?P<text>.+)$",  # GCC, Clang
    r"^ *(?P<file>[^\s:()]+)\((?P<line>\d+)\): (?:catastrophic |internal )?error\b[^:]*: (?P<text>.+)$",  # nvcc
    r"^ *CMake Error at (?P<file>[^:]+):(?P<line>\d+) .*\n+(?P<text>.+)$",
    r"^ *(?P<text>CMake Error: .+)$",
    r"^ *(?:nvcc )?(?P<text>(?:fatal   : |\S*(?:\+\+|cc|clang)\S*: (?:fatal )?error: ).+)$",
    r"^ *(?P<text>fatal error: .+|error: (?:invalid value|unknown argument|unsupported option|unable to) .+)$",  # Clang
    r"^ *(?P<text>(?:\S*/)?(?:ld|lld|ld\.\w+): (?:error: )?(?:cannot find|undefined|unable to find).+)$",
    r"^ *(?P<text>.*: undefined reference to .+)$",
    r"^ *(?P<text>.*: error while loading shared libraries: .+)$",
)
# Advice by the text of such an error; the first match counts.
COMPILER = (
    Kind(
        r"Python\.h",
        "Install the headers of this Python (Debian: python3-dev, Fedora: python3-devel), or use a Python that has "
        "them (conda's and uv's do).",
    ),
    Kind(
        r"nccl\.h|[Nn]ccl|NCCL",
        "HOROVOD_GPU_OPERATIONS=NCCL needs NCCL's header and library: install a torch that brings them, or set "
        "HOROVOD_NCCL_HOME to the folder with include and lib.",
    ),
    Kind(
        r"CUDAToolkit|CMAKE_CUDA_COMPILER|CUDA_TOOLKIT_ROOT_DIR|cuda_runtime",
        "A build with GPUs needs CUDA's compiler and libraries: set HOROVOD_CUDA_HOME to the folder with bin/nvcc, or "
        "build without HOROVOD_GPU_OPERATIONS.",
    ),
    Kind(
        r"unsupported GNU version|unsupported clang version|host_config\.h",
        "This nvcc does not support so new a compiler: choose an older one, CXX=/path/to/g++-13, or use a newer CUDA.",
    ),
    Kind(
        r"Unsupported gpu architecture",
        "This nvcc does not support that GPU: set HOROVOD_BUILD_CUDA_CC_LIST from nvcc --list-gpu-code, like 80,90.",
    ),
    Kind(r"MPI_CXX|Could NOT find MPI|mpi\.h", "Install your MPI's development package, so that mpicxx works."),
    Kind(
        r"unrecognized command[- ]line option .-std|invalid value .c\+\+|is not defined for option 'std'",
        "The compiler is too old: at least GCC 11 or Clang 14 is needed; set CXX=/path/to/g++.",
    ),
    Kind(r"internal compiler error|Segmentation fault", _MEMORY),
    Kind(r"cannot find -lstdc\+\+", "Install GCC's standard library (Debian: libstdc++-dev, or g++)."),
    Kind(
        r"cannot find -l|error while loading shared libraries|unable to find library",
        "Install the named library, or add its folder to LIBRARY_PATH and LD_LIBRARY_PATH.",
    ),
    Kind(
        r"undefined reference",
        "Compiler and framework disagree about the C++ library: build with the compiler that the framework was built "
        "with (GCC, libstdc++).",
    ),
)
COMPILER_DEFAULT = (
    f"This compiler rejects Horovod's source: choose another, CXX=/path/to/g++-12 (GCC 12 is tested most), {_WITHOUT}. "
    "Please report these lines."
)
# Errors of pip, in this order.
PIP = (
    Kind(r"(?P<text>error: externally-managed-environment)", "Make an environment first: python3 -m venv FOLDER."),
    Kind(r"(?P<text>No module named pip)", "Give this environment pip: python -m ensurepip, or uv pip install pip."),
    Kind(
        r"(?P<text>Network is unreachable|Temporary failure in name resolution|Name or service not known|"
        r"Failed to establish a new connection[^'\"]*|Connection (?:refused|broken|reset)[^'\"]*|Read timed out|"
        r"SSLError[^'\"]*|CERTIFICATE_VERIFY_FAILED|ProxyError[^'\"]*|HTTP error \d+[^'\"\n]*|NameResolutionError)",
        _NETWORK,
    ),
    Kind(r"ERROR: (?P<text>No matching distribution found for .+)", ""),
    Kind(r"ERROR: (?P<text>Cannot install .+)", "Two requirements exclude each other: see the log."),
    Kind(r"(?P<text>Permission denied: .+|Read-only file system.*)", "Use an environment that you may write to."),
    Kind(r"ERROR: (?P<text>Could not install packages due to .+)", "See the log."),
)
_PYTHON = r"^ *(?P<text>\w*(?:Error|Exception): .+)$"


def explain(output: str, log: Path, python: str = "", compiler: str = "") -> str:
    """Return the explanation of a failed command, in lines: the cause, the compiler, what to do, the log's path.

    Args:
        python: the target's version, for packages without a wheel for it.
        compiler: the compiler's version, shown with its errors.
    """
    cause, advice, compiled = _cause(output, python)
    lines = [cause]
    if compiled and compiler:
        lines.append(f"compiler: {compiler}")
    lines += [f"what to do: {advice}", f"log: {log}"]
    return "\n".join(lines)


def first_error(output: str) -> tuple[str, str] | None:
    """Return ``FILE:LINE: TEXT``, or ``TEXT``, of the first error in a build's output, and what to do; or None."""
    matches = [match for match in (re.search(p, output, re.M) for p in ERRORS) if match]
    if not matches:
        return None
    first = min(matches, key=lambda match: match.start())
    text = first["text"].strip()
    groups = first.groupdict()
    error = f"{_source(groups['file'])}:{groups['line']}: {text}" if groups.get("file") else text
    return error, next((kind.advice for kind in COMPILER if re.search(kind.pattern, error)), COMPILER_DEFAULT)


def _cause(output: str, python: str) -> tuple[str, str, bool]:
    """Return the cause, what to do, and whether it is a compiler's error."""
    for kind in ENVIRONMENT:
        line = next((line for line in output.splitlines() if re.search(kind.pattern, line)), None)
        if line is not None:
            return line.strip()[:300], kind.advice, False
    error = first_error(output)
    if error is not None:
        return *error, True
    for kind in PIP:
        match = re.search(kind.pattern, output)
        if match:
            return match["text"].strip()[:300], kind.advice or _no_distribution(match["text"], python), False
    python_error = list(re.finditer(_PYTHON, output, re.M))
    if python_error:
        return python_error[-1]["text"][:300], f"Read the log, {_WITHOUT}.", False
    return " ".join(_last_lines(output)) or "it printed nothing", f"Read the log, {_WITHOUT}.", False


def _no_distribution(text: str, python: str) -> str:
    """Return the advice for a package of which pip finds no version."""
    name = re.split(r"[=<>!~\[ ;]", text.removeprefix("No matching distribution found for "))[0]
    return (
        f"The package index has no such {name} for Python {python or 'of this version'} on this machine: use another "
        "Python (3.10 to 3.13 have all packages), or check that pip reaches the index (pip config list)."
    )


def _source(file: str) -> str:
    """Return a path relative to Horovod's source distribution."""
    return re.sub(r"^.*/horovod-[\d.]+/", "", file)


def _last_lines(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip()][-3:]
