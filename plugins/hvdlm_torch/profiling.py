"""Traces of steps, and the ranges in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


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
