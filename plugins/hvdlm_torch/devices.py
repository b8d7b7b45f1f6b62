"""The device of a rank, and what options that are left to it stand for."""

from __future__ import annotations

import ctypes
import socket

import numpy as np
import torch

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.world import World
from hvdlm_torch import compiler

_BF16 = (8, 0)  # compute capability of the first GPUs with bf16 and TF32 (Ampere)
# Parameters of glibc's mallopt, and their values: larger blocks than 32 MiB can't be kept.
_KEEP = {-3: 32 * 2**20, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def select(world: World, config: Config) -> torch.device:
    """Make the GPU of this local rank the current one, and set how it multiplies fp32 matrices.

    Returns:
        The GPU, which ranks share where there are fewer; the CPU where no GPU is visible.

    Raises:
        HvdlmError: the precision needs a GPU.
    """
    if torch.cuda.is_available():
        number = world.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(number)
        torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
        torch.backends.cudnn.allow_tf32 = config.train.tf32
        if config.communication.reduction == "exact":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # which nothing reads
        return torch.device("cuda", number)
    if config.train.precision == "fp16":
        raise HvdlmError("train.precision fp16 needs a GPU, and none is visible here: use bf16 or fp32.")
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of tensors that are freed for those of the next step.

    glibc would give it back, and the system clear it page by page again: 1 to 2 ms of the 19 ms of a step of a GPT of
    0.8 million parameters. TensorFlow reuses its memory by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for parameter, value in _KEEP.items():
            mallopt(parameter, value)


def resolve(config: Config, spec: ModelSpec, world: World) -> Resolved:
    """Select this rank's device; return what the rank computes with.

    Raises:
        HvdlmError: the precision or an option needs a GPU.
    """
    device = select(world, config)
    if config.train.activation_offload and device.type == "cpu":
        raise HvdlmError(
            "train.activation_offload keeps activations of a GPU in the host's memory, and no GPU is visible here: "
            "leave it out, or --train.activation_checkpointing true."
        )
    compiled, notes = compiler.resolve(config, spec, device)
    if device.type == "cpu":
        return Resolved(compile=compiled, notes=notes)
    properties = torch.cuda.get_device_properties(device)
    identity = str(getattr(properties, "uuid", f"{socket.gethostname()} {device.index}"))
    ampere = torch.cuda.get_device_capability(device) >= _BF16
    tf32 = config.train.tf32 and ampere
    notes = (f"fp32 products in {'TF32' if tf32 else 'fp32'}", *notes)
    return Resolved(properties.name, identity, "bf16" if ampere else "fp32", tf32, compiled, notes)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``, where it arrives before work that is enqueued later; a CPU shares its memory.

    From memory that isn't pinned, PyTorch copies only after all work that is enqueued already. It reuses pinned memory
    once the copy is done.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
