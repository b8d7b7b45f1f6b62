"""Attention, by ``scaled_dot_product_attention``; that of a window in blocks.

TensorFlow's twin computes attention itself, in chunks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the attention of ``q`` ``[rows, heads, time, head]``: ``[rows, time, heads * head]``.

    Args:
        q: queries.
        k: keys ``[rows, kv_heads, keys, head]``, each of which serves ``heads / kv_heads`` consecutive query heads.
        v: values, as ``k``.
        mask: bool that broadcasts to ``[rows, heads, time, keys]``: whether a query sees a key; None: all of them.
    """
    grouped = q.shape[1] != k.shape[1]
    return _side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped))


def attend_causally(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0, masks: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Return the attention of positions to themselves and those before; see ``attend``.

    Args:
        q, k, v: as of ``attend``.
        window: the positions that a query sees, itself and those before it; 0: all.
        masks: of rows that are divided into documents: ``document_masks``.
    """
    if window and window < q.shape[2]:
        return _side_by_side(_in_blocks(q, k, v, window, masks))
    if masks:
        return _side_by_side(_masked(q, k, v, masks[0]))
    grouped = q.shape[1] != k.shape[1]
    return _side_by_side(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))


def causal_mask(time: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Return bool ``[time, keys]``: whether the queries of the last ``time`` positions see a key; see ``window``."""
    # is_causal would align the mask with the first key; the new tokens are the last ones.
    mask = torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)
    return mask.triu(keys - time - window + 1) if window and window < keys else mask


def document_masks(starts: torch.Tensor, window: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return what is added to scores so that queries see keys of their own document only, in ``dtype``.

    They are for ``attend_causally`` of all layers: ``[rows, 1, time, time]``; or, with a shorter window, of its first
    block ``[rows, 1, window, window]`` and of all others ``[rows * (blocks - 1), 1, window, 2 * window]``.
    ``starts``: int32 ``[rows, time]``, the position of the first token of every position's document.
    """
    time = starts.shape[1]
    if not window or window >= time:
        return (_added(starts, 0, 0, time, time, dtype),)
    blocks = -(-time // window)
    starts = F.pad(starts, (0, blocks * window - time)).unflatten(1, (blocks, window))
    blocks_before = window * torch.arange(blocks - 1, device=starts.device)[:, None, None]
    others = _added(starts[:, 1:], blocks_before + window, blocks_before, 2 * window, window, dtype)
    return _added(starts[:, 0], 0, 0, window, window, dtype), others.flatten(0, 1)


def _added(starts: torch.Tensor, query: Any, key: Any, keys: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of queries ``[..., queries]`` from position ``query`` on, and of ``keys`` from ``key`` on.

    That is ``[..., 1, queries, keys]``: 0 where a query sees a key, else minus infinity. Positions may be tensors.
    """
    queries = query + torch.arange(starts.shape[-1], device=starts.device)[:, None]
    seen = key + torch.arange(keys, device=starts.device)
    visible = (seen <= queries) & (seen > queries - window) & (seen >= starts[..., None])
    return torch.zeros((), dtype=dtype, device=starts.device).where(visible, -math.inf).unsqueeze(-3)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the attention with a mask, ``[rows, heads, time, head]``."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cuda":  # whose kernels that take a mask know no groups
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return ``[rows, heads, time, head]``: queries in blocks of a window, which see their keys and the block before.

    The scores grow with ``time x window`` (Beltagy et al. 2020, section 3.1), a mask of them with ``window`` alone.
    """
    rows, _, time, _ = q.shape
    grouped = q.shape[1] != k.shape[1]
    block = q[:, :, :window], k[:, :, :window], v[:, :, :window]
    if masks:
        first = _masked(*block, masks[0])
    else:
        first = F.scaled_dot_product_attention(*block, is_causal=True, enable_gqa=grouped)
    blocks = -(-time // window)
    missing = blocks * window - time  # padded at the end, which no query sees
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v)) if missing else (q, k, v)
    q, k, v = (x.unflatten(2, (blocks, window)) for x in (q, k, v))
    q = q[:, :, 1:]
    k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), 3) for x in (k, v))  # [rows, kv_heads, blocks - 1, 2 window, head]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    if masks:
        mask = masks[1]
    else:  # of query i, key j of the block before and its own is at distance window + i - j
        mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).triu(1).tril(window)
    others = _masked(q, k, v, mask)
    others = others.unflatten(0, (rows, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, others[:, :, : time - window]), 2)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Return ``[rows, heads, time, head]`` as ``[rows, time, heads * head]``."""
    rows, _, time, _ = x.shape
    return x.transpose(1, 2).reshape(rows, time, -1)
