"""Compiled steps, and whether there are any: where they were measured to be faster, and torch.compile can work.

It writes C++ for a CPU and C for a GPU, and calls a compiler of the machine for it.

Without a twin: TensorFlow's compiler (XLA) needs no other program.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from hvdlm.config import Config
from hvdlm.diagnostics.phases import READING, process
from hvdlm.models.spec import ModelSpec
from hvdlm_torch import operations
from hvdlm_torch.plugin import uncompilable

_INCLUDES = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


def resolve(config: Config, spec: ModelSpec, device: torch.device) -> tuple[bool, tuple[str, ...]]:
    """Return whether to compile; and why not, where it was asked for or would be faster."""
    asked = config.train.compile
    wanted = asked if isinstance(asked, bool) else is_faster(config, spec, device)
    lacking = missing(device) if wanted else ""
    return wanted and not lacking, ((f"torch.compile needs {lacking}",) if lacking else ())


def is_faster(config: Config, spec: ModelSpec, device: torch.device) -> bool:
    """Return whether compiled steps of this run were measured to be faster, the time of compiling included.

    On an H100, bf16 steps of GPT-2 124M are 1.5 times as fast. On a CPU, GPTs of 0.8 and 10.7 million parameters gain
    0.3% and 1%, and compiling takes as long as thousands of steps (benchmarks/compiled_steps.py). Other models were not
    measured. Ranks that share a model compile, too: what they compute between collectives is the same, but several GPUs
    were not measured.
    """
    if config.communication.reduction == "exact":  # Triton chooses the order of sums by measuring
        return False
    if config.parallel.context > 1:  # a compiled step has no collectives in the background
        return False
    return spec.kind == "gpt" and device.type != "cpu" and not uncompilable(config, spec)


def missing(device: torch.device) -> str:
    """Return what torch.compile lacks to compile for ``device``; ``""`` where all is there."""
    if device.type == "cpu":
        names = [os.environ.get("CXX") or "g++"]  # torch tries no other
    else:
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"a compiler, and {' or '.join(names)} is not on PATH"
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return "triton, which is not installed"
    folders = [sysconfig.get_path("include"), *":".join(os.environ.get(name, "") for name in _INCLUDES).split(":")]
    if not any(folder and (Path(folder) / "Python.h").exists() for folder in folders):
        return "Python's headers (Python.h), which are not installed: CPATH may name their folder"
    return ""


def compiled(method: MethodType) -> Callable[..., Any]:
    """Return ``method`` of this object, to be compiled when it is called, and again where shapes differ."""
    _prepare()
    # Of a copy of the code, because torch compiles no code object more than 8 times: the ninth model of a process would
    # be computed as it is.
    code, f = method.__func__.__code__.replace(), method.__func__
    copy = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(MethodType(copy, method.__self__))


@functools.cache
def _prepare() -> None:
    """Keep the order of collectives, and have the watchdogs of all ranks see when this process compiles.

    Other ranks may find their code in a cache, and then wait for this one in a collective.
    """
    from torch._dynamo.callback import callback_handler

    operations.keep_order()

    phase = ExitStack()
    callback_handler.register_start_callback(
        lambda _: phase.enter_context(process.during("compiling a step", patience=READING))
    )
    callback_handler.register_end_callback(lambda _: phase.close())
