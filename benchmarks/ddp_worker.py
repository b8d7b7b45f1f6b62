"""Trains the plain GPT of plain_gpt.py with PyTorch's DistributedDataParallel over Gloo, on ranks that mpirun started.

The seconds of every step that counts are emitted by rank 0. Nothing of hvdlm.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import emit
from plain_gpt import PlainLoop, Settings, Sizes
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

HOOKS = ("dense", "fp16", "power_sgd")
_VOCABULARY = 65  # that of hvdlm's built-in text
_PORT = 29_517


def in_turn(hook: Any) -> Any:
    """Return ``hook`` with buckets that follow each other.

    PyTorch's own PowerSGD starts a bucket's second sum from a thread of Gloo, so that the sums of several buckets have
    another order on each rank: Gloo matches them by their order, and aborts. The backward pass goes on meanwhile.
    """
    before: Any = None

    def ordered(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal before
        total: torch.futures.Future[torch.Tensor] = torch.futures.Future()

        def end(done: Any) -> None:
            try:
                total.set_result(done.value())
            except Exception as error:
                total.set_exception(error)

        def start(_: Any = None) -> None:
            hook(state, bucket).then(end)

        if before is None:
            start()
        else:
            before.then(start)
        before = total
        return total

    return ordered


def hooked(module: torch.nn.Module, hook: str, rank: int, uncounted: int) -> DistributedDataParallel:
    """Return ``module`` under DDP; ``rank``: of PowerSGD's factors, which begins after ``uncounted`` steps."""
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if hook == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if hook == "power_sgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=uncounted)
        parallel.register_comm_hook(state, in_turn(powerSGD_hook.powerSGD_hook))
    return parallel


def main() -> None:
    """Train, and emit the seconds of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("layers", "width", "rows", "context", "steps", "uncounted", "power_sgd_rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--hook", choices=HOOKS, required=True)
    parser.add_argument("--address", required=True, help="of rank 0's host")
    parser.add_argument("--interface", required=True, help="the network interface")
    o = parser.parse_args()
    rank, ranks = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    os.environ["GLOO_SOCKET_IFNAME"] = o.interface
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{o.address}:{_PORT}", rank=rank, world_size=ranks)
    sizes = Sizes(layers=o.layers, width=o.width, heads=6, context=o.context, vocab=_VOCABULARY)
    settings = Settings(rows=o.rows, bf16=False)
    tokens = np.random.default_rng(1).integers(0, _VOCABULARY, 100_000)

    def wrap(model: Any) -> Any:
        return hooked(model, o.hook, o.power_sgd_rank, o.uncounted)

    loop = PlainLoop(sizes, settings, tokens, wrap=wrap, seed=rank)
    seconds = []
    for _ in range(o.steps):
        began = time.perf_counter()
        loop.step()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        emit("parameters", sizes.parameters)
        emit("seconds", seconds[o.uncounted :])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
