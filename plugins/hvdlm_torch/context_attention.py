"""Ring attention of context ranks (Liu et al. 2023, arXiv 2310.01889): keys and values go round a ring of ranks.

A rank attends to one rank's keys after another, by PyTorch's fused kernels, which return the logarithm of a softmax's
sum beside its output: two outputs are merged by these (Dao et al. 2022, section 3.1). Its backward pass needs only the
merged ones, so that a rank keeps its own queries, keys and values for it, and no scores. Chunks of positions are
divided so that ranks have equal work (``hvdlm_language.context_ranks``); blocks that no query sees are left out.

TensorFlow's twin gathers keys and values, since a graph can't send them in the background.
"""

from __future__ import annotations

from typing import Any

import torch

from hvdlm_language.context_ranks import ContextRanks

_HALF = (torch.bfloat16, torch.float16)
_ALIGNED = 32  # queries to whose multiples the memory-efficient kernel pads its logarithms
_FLASH_WIDTH = 8  # of which a head's width is a multiple, for the flash kernel of GPUs
_aten = torch.ops.aten


def attend_over_ranks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: ContextRanks, name: str
) -> torch.Tensor:
    """Return the causal attention of this rank's positions to those of all ranks, ``[rows, time, heads * head]``.

    Args:
        q: queries ``[rows, heads, time, head]``.
        k: keys ``[rows, kv_heads, time, head]``, each of which serves ``heads / kv_heads`` consecutive query heads.
        v: values, as ``k``.
        ranks: those that have the other positions.
        name: of the collectives.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    output: torch.Tensor = _RingAttention.apply(q, k, v, ranks, name)
    rows, _, time, _ = q.shape
    return output.transpose(1, 2).reshape(rows, time, -1)


class _RingAttention(torch.autograd.Function):
    """Attention to the blocks that pass by. The next one's transfer is started before one is computed."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: ContextRanks, name: str
    ) -> torch.Tensor:
        rows, heads, time, head = q.shape
        block = torch.stack((k, v))
        # As the queries' product lies in memory, so that heads are side by side without a copy.
        output = q.new_empty((rows, time, heads, head), dtype=torch.float32).transpose(1, 2)
        sums = q.new_empty((rows, heads, time), dtype=torch.float32)
        for hop in range(ranks.size):
            arriving = ranks.shift(block, f"{name}.forward.{hop}") if hop + 1 < ranks.size else None
            queries, keys = ranks.visible((ranks.index - hop) % ranks.size, time)
            keys_values = _expanded(block[:, :, :, keys], heads)
            of_block, block_sums = _attend(q[:, :, queries], keys_values[0], keys_values[1], hop == 0)
            if hop == 0:
                output.copy_(of_block)
                sums.copy_(block_sums)
            else:
                merged, earlier = output[:, :, queries], sums[:, :, queries]
                merged.lerp_(of_block.float(), torch.sigmoid(block_sums - earlier).unsqueeze(-1))
                earlier.copy_(torch.logaddexp(earlier, block_sums))
            if arriving is not None:
                block = arriving.wait()
        ranks.sent()
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.ring = ranks, name
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, output, sums = ctx.saved_tensors
        ranks, name = ctx.ring
        heads, time = q.shape[1:3]
        block = torch.stack((k, v))
        of_q = torch.zeros_like(q, dtype=torch.float32)
        own = torch.zeros_like(block, dtype=torch.float32)
        sent: Any = None  # the gradients of a block that is passed on, to which each rank adds its own
        for hop in range(ranks.size):
            arriving = ranks.shift(block, f"{name}.backward.{hop}") if hop + 1 < ranks.size else None
            queries, keys = ranks.visible((ranks.index - hop) % ranks.size, time)
            of_output, chunk, attended, logarithms = (x[:, :, queries] for x in (gradient, q, output, sums))
            keys_values = _expanded(block[:, :, :, keys], heads)
            of_chunk, *of_keys_values = _gradients(
                of_output, chunk, attended, logarithms, keys_values[0], keys_values[1], hop == 0
            )
            of_q[:, :, queries] += of_chunk
            of_block = own
            if hop:
                of_block = torch.zeros_like(own) if sent is None else sent.wait()
            for total, new in zip(of_block, of_keys_values, strict=True):
                total[:, :, keys] += _summed(new, k.shape[1])
            if hop:
                sent = ranks.shift(of_block, f"{name}.gradient.{hop}")
            if arriving is not None:
                block = arriving.wait()
        if sent is not None:  # the last one to be passed on is the next rank's own
            own += sent.wait()
        ranks.sent()
        return of_q.to(q.dtype), *own.to(q.dtype), None, None


def _expanded(block: torch.Tensor, heads: int) -> torch.Tensor:
    """Return keys and values ``[2, rows, kv_heads, keys, head]`` with one for each of the query heads."""
    kv_heads = block.shape[2]
    return block if heads == kv_heads else block.repeat_interleave(heads // kv_heads, 2)


def _summed(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return the sums of ``x`` ``[rows, heads, keys, head]`` over the query heads of a key-value head, float32."""
    return x.float().unflatten(1, (kv_heads, -1)).sum(2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of ``q`` to one block, and the logarithms of its softmax's sums, ``[rows, heads, time]``."""
    if q.device.type == "cpu":
        output, sums = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif _by_flash(q):
        output, sums, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        output, sums, _, _ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return output, sums[:, :, : q.shape[2]]


def _gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values from one block.

    With the output and the sums of all blocks, the kernels' weights are those of all blocks, too.
    """
    sums = sums.contiguous()
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, output, sums, 0.0, causal)
    if _by_flash(q):
        lengths = None, None, q.shape[2], k.shape[2]
        state = torch.zeros((2,), dtype=torch.uint64, device=q.device)  # of dropout's generator, which isn't used
        return _aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, output, sums, *lengths, 0.0, causal, state, state[:0]
        )
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[2] % _ALIGNED))
    wanted = [True, True, True, False]
    of_q, of_k, of_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        gradient, q, k, v, None, output, sums, state, state, 0.0, wanted, causal
    )
    return of_q, of_k, of_v


def _by_flash(q: torch.Tensor) -> bool:
    """Return whether the flash kernel of GPUs computes this."""
    return q.dtype in _HALF and q.shape[-1] % _FLASH_WIDTH == 0
