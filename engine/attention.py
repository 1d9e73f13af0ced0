"""Attention over the paged cache, in plain torch: all decodes of a step in a few calls, each prefill chunk in one.

A step's rows are the decodes first (one row each, longest context first), then the chunks. Everything that is the same
for all layers is planned once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

# Another group costs about one more SDPA and gather per layer, about as long as gathering this many padding tokens.
GROUP_PAYS_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of the step that belong to one sequence: ``count`` tokens from position ``start`` on."""

    start: int
    count: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes of similar context length, which share one padded gather."""

    first: int  # row of the step
    count: int
    slots: torch.Tensor  # [count * longest] rows of the cache
    mask: torch.Tensor | None  # [count, 1, 1, longest], 0 or -inf; None when nothing is padded


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    first: int
    count: int
    slots: torch.Tensor | None  # [start + count] rows of the cache; None when the chunk starts its sequence
    mask: torch.Tensor | None  # [count, start + count], 0 or -inf: causal, aligned to the lower right


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]
    written: torch.Tensor  # [rows] where in the cache each row's own KV goes

    def attend(self, queries: torch.Tensor, fresh: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """Attention of every row of the step.

        queries: [rows, heads, head_dim]; fresh: [rows, 2 * kv_heads, head_dim], the step's own KV, already written to
        ``layer``: [slots, 2 * kv_heads, head_dim]. Returns [rows, heads * head_dim].
        """
        out = torch.empty_like(queries)
        for group in self.decodes:
            rows = slice(group.first, group.first + group.count)
            out[rows] = _decode(queries[rows], layer.index_select(0, group.slots), group.mask)
        for chunk in self.chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            context = fresh[rows] if chunk.slots is None else layer.index_select(0, chunk.slots)
            out[rows] = _prefill(queries[rows], context, chunk.mask)
        return out.flatten(1)


def _decode(queries: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """queries: [batch, heads, head_dim], context: [batch * longest, 2 * kv_heads, head_dim]. Returns as queries.

    The query heads that share a KV head become the query positions of one attention call: no K or V is repeated.
    """
    batch, heads, head_dim = queries.shape
    keys, values = _keys_values(context.view(batch, -1, *context.shape[1:]))  # [batch, kv_heads, longest, head_dim]
    grouped = queries.view(batch, keys.shape[1], -1, head_dim)  # [batch, kv_heads, heads / kv_heads, head_dim]
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(batch, heads, head_dim)


def _prefill(queries: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """queries: [count, heads, head_dim], context: [start + count, 2 * kv_heads, head_dim]. Returns as queries.

    KV heads play the batch, and the query heads of one KV head see the same K and V through a stride of zero.
    """
    count, heads, head_dim = queries.shape
    keys, values = _keys_values(context.unsqueeze(0))  # [1, kv_heads, context, head_dim]
    kv_heads = keys.shape[1]
    sharing = heads // kv_heads
    keys = keys.transpose(0, 1).expand(kv_heads, sharing, -1, head_dim)
    values = values.transpose(0, 1).expand(kv_heads, sharing, -1, head_dim)
    grouped = queries.view(count, kv_heads, sharing, head_dim).permute(1, 2, 0, 3)
    mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=mask is None)
    return mixed.permute(2, 0, 1, 3).reshape(count, heads, head_dim)


def _keys_values(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, tokens, 2 * kv_heads, head_dim] to K and V, each a view [batch, kv_heads, tokens, head_dim]."""
    keys, values = context.transpose(1, 2).chunk(2, dim=1)
    return keys, values


def plan(
    decodes: Sequence[Span], chunks: Sequence[Span], *, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> AttentionPlan:
    """The plan of one step. ``decodes`` are sorted by falling context length; rows follow the order given."""
    groups, first = [], 0
    for members in _grouped(decodes):
        groups.append(_decode_group(first, members, page_tokens, dtype, device))
        first += len(members)
    planned, written = [], [_own_slots(span, page_tokens) for span in (*decodes, *chunks)]
    for span in chunks:
        planned.append(_prefill_chunk(first, span, page_tokens, dtype, device))
        first += span.count
    return AttentionPlan(tuple(groups), tuple(planned), torch.cat(written).to(device))


def _grouped(decodes: Sequence[Span]) -> list[list[Span]]:
    """Cuts the sorted decodes where the padding saved is worth one more group."""
    groups: list[list[Span]] = []
    for index, span in enumerate(decodes):
        saved = (groups[-1][0].start - span.start) * (len(decodes) - index) if groups else GROUP_PAYS_TOKENS
        if saved >= GROUP_PAYS_TOKENS:
            groups.append([])
        groups[-1].append(span)
    return groups


def _decode_group(
    first: int, members: Sequence[Span], page_tokens: int, dtype: torch.dtype, device: torch.device
) -> DecodeGroup:
    lengths = torch.tensor([span.start + 1 for span in members])
    longest = int(lengths[0])
    wide = -(-longest // page_tokens)
    # Padding reads the sequence's own first page: written, finite, and warm in the caches.
    table = torch.tensor([(span.pages + span.pages[:1] * wide)[:wide] for span in members])
    slots = _slots_of(table, page_tokens)[:, :longest]
    mask = None
    if int(lengths[-1]) != longest:
        padding = torch.arange(longest) >= lengths[:, None]
        mask = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, -torch.inf)[:, None, None].to(device)
    return DecodeGroup(first, len(members), slots.reshape(-1).to(device), mask)


def _prefill_chunk(first: int, span: Span, page_tokens: int, dtype: torch.dtype, device: torch.device) -> PrefillChunk:
    if span.start == 0:
        return PrefillChunk(first, span.count, None, None)
    end = span.start + span.count
    slots = _slots_of(torch.tensor([span.pages]), page_tokens).reshape(-1)[:end]
    mask = torch.full((span.count, end), -torch.inf, dtype=dtype).triu_(span.start + 1)
    return PrefillChunk(first, span.count, slots.to(device), mask.to(device))


def _own_slots(span: Span, page_tokens: int) -> torch.Tensor:
    if span.count == 1:
        return torch.tensor([span.pages[span.start // page_tokens] * page_tokens + span.start % page_tokens])
    first_page = span.start // page_tokens
    end_page = -(-(span.start + span.count) // page_tokens)
    slots = _slots_of(torch.tensor([span.pages[first_page:end_page]]), page_tokens).reshape(-1)
    offset = span.start - first_page * page_tokens
    return slots[offset : offset + span.count]


def _slots_of(table: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """[rows, pages] block tables to [rows, pages * page_tokens] rows of the cache."""
    return (table[:, :, None] * page_tokens + torch.arange(page_tokens)).flatten(1)
