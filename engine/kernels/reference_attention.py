"""Plain-torch twins of the paged attention kernels: same arguments, float32 inside, rounded once. Slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_decode(
    queries: Tensor,
    layer: Tensor,
    block_table: Tensor,
    contexts: Tensor,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As :func:`engine.kernels.paged_decode.paged_decode`."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for row, context in enumerate(contexts.tolist()):
        if context:
            keys, values = _gather(layer, block_table[row], context, page_tokens)
            out[row] = _attend(queries[row : row + 1], keys, values, context - 1, scale, window)[0]
    return out


def paged_prefill(
    queries: Tensor,
    layer: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As :func:`engine.kernels.paged_prefill.paged_prefill`. Rows of no chunk are zeros."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    chunks = zip(row_starts.tolist(), starts.tolist(), counts.tolist(), strict=True)
    for sequence, (first, start, count) in enumerate(chunks):
        keys, values = _gather(layer, block_table[sequence], start + count, page_tokens)
        rows = slice(first, first + count)
        out[rows] = _attend(queries[rows], keys, values, start, scale, window)
    return out


def _gather(layer: Tensor, pages: Tensor, context: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first ``context`` tokens, each [context, kv_heads, head_dim], in float32."""
    tokens = torch.arange(context, device=layer.device)
    slots = pages.long()[tokens // page_tokens] * page_tokens + tokens % page_tokens
    keys, values = layer[slots].float().chunk(2, dim=1)
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """queries [count, heads, head_dim] stand at positions ``start`` on; keys and values at 0 on."""
    sharing = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(sharing, dim=1), values.repeat_interleave(sharing, dim=1)
    scores = scale * torch.einsum("qhd,khd->hqk", queries.float(), keys)
    at = start + torch.arange(queries.shape[0], device=queries.device)[:, None]
    token = torch.arange(keys.shape[0], device=queries.device)
    hidden = token > at
    if window is not None:
        hidden |= token <= at - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(queries.dtype)
