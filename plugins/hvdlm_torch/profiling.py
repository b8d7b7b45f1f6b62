"""Traces of steps, the ranges in them, and the GPU of this rank."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hvdlm.protocols.types import Device


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name what runs inside in traces and, on GPUs, for NVIDIA's tools (NVTX)."""
    gpu = torch.cuda.is_initialized()
    if gpu:
        torch.cuda.nvtx.range_push(name)
    try:
        # The check takes 60 ns, a range that nobody records several microseconds.
        with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
            yield
    finally:
        if gpu:
            torch.cuda.nvtx.range_pop()


class Trace:
    """A trace that is being recorded."""

    def __init__(self) -> None:
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profiler.start()

    def stop(self) -> str:
        """End the recording; return it as JSON for Chrome's trace viewer."""
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            return path.read_text()


def gpu(device: torch.device, precision: str) -> Device | None:
    """Return ``device`` if it is a GPU, with the precision of its products; ``precision``: ``train.precision``."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    identity = str(getattr(properties, "uuid", f"{socket.gethostname()} {device.index}"))
    return Device(properties.name, precision, identity, torch.cuda.max_memory_allocated(device))
