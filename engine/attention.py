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
    lengths: torch.Tensor  # [count] tokens that each query sees
    longest: int
    padded: bool

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """[count, 1, 1, longest], 0 or -inf; None when every query sees everything gathered."""
        if not self.padded and (window is None or window >= self.longest):
            return None
        tokens = torch.arange(self.longest, device=self.lengths.device)
        hidden = tokens >= self.lengths[:, None]
        if window is not None:
            hidden |= tokens < self.lengths[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    first: int
    start: int
    count: int
    slots: torch.Tensor | None  # [start + count] rows of the cache; None when the chunk starts its sequence

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """[count, start + count], 0 or -inf, causal and aligned to the lower right; None for the plain triangle."""
        end = self.start + self.count
        if self.start == 0 and (window is None or window >= self.count):
            return None
        mask = torch.full((self.count, end), -torch.inf, dtype=dtype, device=device)
        seen = mask.triu(self.start + 1)
        return seen if window is None else seen + mask.tril(self.start - window)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]
    written: torch.Tensor  # [rows] where in the cache each row's own KV goes
    masks: dict[int | None, tuple[torch.Tensor | None, ...]]  # by window: the groups', then the chunks'

    def attend(
        self, queries: torch.Tensor, fresh: torch.Tensor, layer: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Attention of every row of the step.

        queries: [rows, heads, head_dim]; fresh: [rows, 2 * kv_heads, head_dim], the step's own KV, already written to
        ``layer``: [slots, 2 * kv_heads, head_dim]. Returns [rows, heads * head_dim].
        """
        masks = self._masks(window, queries)
        out = torch.empty_like(queries)
        for group, mask in zip(self.decodes, masks, strict=False):
            rows = slice(group.first, group.first + group.count)
            out[rows] = _decode(queries[rows], layer.index_select(0, group.slots), mask)
        for chunk, mask in zip(self.chunks, masks[len(self.decodes) :], strict=True):
            rows = slice(chunk.first, chunk.first + chunk.count)
            context = fresh[rows] if chunk.slots is None else layer.index_select(0, chunk.slots)
            out[rows] = _prefill(queries[rows], context, mask)
        return out.flatten(1)

    def _masks(self, window: int | None, queries: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Made once a step for each window that the model's layers have."""
        if window not in self.masks:
            dtype, device = queries.dtype, queries.device
            decodes = [group.mask(window, dtype) for group in self.decodes]
            self.masks[window] = (*decodes, *(chunk.mask(window, dtype, device) for chunk in self.chunks))
        return self.masks[window]


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


def plan(decodes: Sequence[Span], chunks: Sequence[Span], *, page_tokens: int, device: torch.device) -> AttentionPlan:
    """The plan of one step. ``decodes`` are sorted by falling context length; rows follow the order given."""
    groups, first = [], 0
    for members in _grouped(decodes):
        groups.append(_decode_group(first, members, page_tokens, device))
        first += len(members)
    planned, written = [], [_own_slots(span, page_tokens) for span in (*decodes, *chunks)]
    for span in chunks:
        planned.append(_prefill_chunk(first, span, page_tokens, device))
        first += span.count
    return AttentionPlan(tuple(groups), tuple(planned), torch.cat(written).to(device), {})


def _grouped(decodes: Sequence[Span]) -> list[list[Span]]:
    """Cuts the sorted decodes where the padding saved is worth one more group."""
    groups: list[list[Span]] = []
    for index, span in enumerate(decodes):
        saved = (groups[-1][0].start - span.start) * (len(decodes) - index) if groups else GROUP_PAYS_TOKENS
        if saved >= GROUP_PAYS_TOKENS:
            groups.append([])
        groups[-1].append(span)
    return groups


def _decode_group(first: int, members: Sequence[Span], page_tokens: int, device: torch.device) -> DecodeGroup:
    lengths = torch.tensor([span.start + 1 for span in members])
    longest = members[0].start + 1
    wide = -(-longest // page_tokens)
    # Padding reads the sequence's own first page: written, finite, and warm in the caches.
    table = torch.tensor([(span.pages + span.pages[:1] * wide)[:wide] for span in members])
    slots = _slots_of(table, page_tokens)[:, :longest].reshape(-1)
    padded = members[-1].start + 1 != longest
    return DecodeGroup(first, len(members), slots.to(device), lengths.to(device), longest, padded)


def _prefill_chunk(first: int, span: Span, page_tokens: int, device: torch.device) -> PrefillChunk:
    if span.start == 0:
        return PrefillChunk(first, 0, span.count, None)
    slots = _slots_of(torch.tensor([span.pages]), page_tokens).reshape(-1)[: span.start + span.count]
    return PrefillChunk(first, span.start, span.count, slots.to(device))


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
