"""The device of a rank, and what options that are left to it stand for."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import tensorflow as tf

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import rank_context
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.world import World

_BF16 = (8, 0)  # compute capability of the first GPUs with bf16 and TF32 (Ampere)
_RANKS = 64  # that are threads: TensorFlow's pool of threads, which never grows, is made for as many at least
_THREADS = "TF_NUM_INTEROP_THREADS"
_starting = threading.Lock()


def select(world: World, config: Config) -> Any:
    """Make the GPU of this local rank the only visible one, and set how it multiplies fp32 matrices.

    Returns:
        The GPU, which ranks share where there are fewer, or None (the CPU) where no GPU is visible.

    Raises:
        HvdlmError: the precision needs a GPU.
    """
    provide_threads()
    devices = tf.config.list_physical_devices("GPU")
    if devices:
        device = devices[world.local_rank % len(devices)]
        tf.config.set_visible_devices(device, "GPU")
        tf.config.experimental.set_memory_growth(device, True)
        tf.config.experimental.enable_tensor_float_32_execution(config.train.tf32)
        if config.communication.reduction == "exact":
            tf.config.experimental.enable_op_determinism()
        return device
    if config.train.precision == "fp16":
        raise HvdlmError("train.precision fp16 needs a GPU, and none is visible here: use bf16 or fp32.")
    return None


def provide_threads() -> None:
    """Have TensorFlow start a thread for each rank of this process, and for each core one more.

    The graphs of all ranks share one pool of threads, and each rank occupies one of them while it waits for the others.

    Raises:
        HvdlmError: TensorFlow has started already, with fewer.
    """
    own, options = rank_context.current(), tf.config.threading
    if own is None:
        return
    with _starting:
        if options.get_inter_op_parallelism_threads() > own.launch.size:
            return
        cores = os.cpu_count() or 1
        try:
            options.set_inter_op_parallelism_threads(max(own.launch.size, _RANKS) + cores)
        except RuntimeError as error:
            started = options.get_inter_op_parallelism_threads() or int(os.environ.get(_THREADS) or cores)
            if started <= own.launch.size:
                raise HvdlmError(
                    f"TensorFlow has started in this process with {started} threads for operations, of which each of "
                    f"{own.launch.size} ranks may occupy one while it waits: start the ranks before anything else uses "
                    f"TensorFlow, or set {_THREADS}={own.launch.size + cores}."
                ) from error


def resolve(config: Config, spec: ModelSpec, world: World) -> Resolved:
    """Select this rank's device; return what the rank computes with."""
    device = select(world, config)
    # auto is off: on a CPU, XLA makes steps of GPTs of 0.8 and 10.7 million parameters 1.02 and 0.98 times as fast
    # (benchmarks/compiled_steps.py); on GPUs it was not measured.
    compiled = config.train.compile is True
    if device is None:
        return Resolved(compile=compiled)
    details = tf.config.experimental.get_device_details(device)
    ampere = details.get("compute_capability", (0, 0)) >= _BF16
    # The layers of a Keras model have a precision of their own.
    precision = "bf16" if ampere and spec.kind != "own" else "fp32"
    tf32 = config.train.tf32 and ampere
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # ranks that see one GPU each number it alike
    identity = f"{socket.gethostname()} {visible} {device.name}"
    notes = (f"fp32 products in {'TF32' if tf32 else 'fp32'}",)
    return Resolved(details.get("device_name", "GPU"), identity, precision, tf32, compiled, notes)
