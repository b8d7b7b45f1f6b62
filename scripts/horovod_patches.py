"""The edits that Horovod 0.28.1's source distribution needs before it builds against today's frameworks.

Horovod 0.28.1 is of June 2023. Each edit is one literal replacement in one file, with the reason it
is there. An edit whose text is not found stops the build: a silent miss would surface as a compiler
error an hour later. Delete an edit when a Horovod release makes it unnecessary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

VERSION = "0.28.1"


class Edit(NamedTuple):
    """Replace ``old`` by ``new`` in ``file`` (relative to the source folder), because of ``why``."""

    file: str
    old: str
    new: str
    why: str


EDITS = (
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 17)",
        "TensorFlow's and torch's headers, which the common code includes through them, are C++17 since 2023.",
    ),
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)",
        'set(CMAKE_CXX_STANDARD_REQUIRED ON)\nset(CMAKE_BUILD_RPATH "\\$ORIGIN/../../../..")',
        "The wheel is cached and installed into other virtual environments. Where MPI is the PyPI package, "
        "libmpi lies in the environment's lib folder, four levels above horovod/torch/mpi_lib_v2.so.",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "torch 2.13's headers use C++20; a C++20 compiler also accepts the C++17 headers of older releases.",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
        "# xla_mpi_ops.cc: left out, see scripts/horovod_patches.py",
        "The TensorFlow wheel lacks a header that this file includes. It holds Horovod's operations inside "
        "XLA programs on GPUs, which hvdlm does not use: it compiles only the parts between collectives.",
    ),
)


def digest() -> str:
    """Return a short hash of all edits: part of the key of the wheel cache."""
    return hashlib.sha256(repr((VERSION, EDITS)).encode()).hexdigest()[:12]


def apply(source: Path) -> None:
    """Apply every edit to the unpacked source distribution in ``source``.

    Raises:
        SystemExit: an edit's text occurs not exactly once in its file.
    """
    for edit in EDITS:
        path = source / edit.file
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"setup: cannot patch Horovod {VERSION}: {edit.file} holds {edit.old!r} {text.count(edit.old)} times, "
                "expected once. Is the source distribution the released one?"
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
