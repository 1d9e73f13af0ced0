"""Prefill attention over pages: chunks of several sequences in one launch, causal, each behind its cached prefix.

FlashAttention-2 (arXiv:2307.08691): one tile of queries walks over its keys with an online softmax in base 2. A tile
holds all query heads of one KV head for a run of tokens, so that short chunks fill it too and less of it is masked.
The chunk's own keys and values are in the pages already, so that prefix and chunk are read alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.paged_decode import LOG2_E, NO_WINDOW, SMALLEST_TILE, TRITON_DTYPES
from engine.kernels.specialisation import Specialisation

# Two for each of the loads that feed another (page, then keys and values), one to compute: see paged_decode.
STAGES = 5


@triton.jit
def _scan(
    carried,  # of the rows: mixed values, largest score, total weight
    queries,  # [ROWS, HEAD_PADDED]
    positions,  # [ROWS]
    layer_ptr,
    table_ptr,
    kv_head,
    scale,
    window,
    begin,  # blocks
    end,
    context,  # tokens
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Adds the keys and values of blocks ``[begin, end)``; unmasked where every row sees all of them."""
    mixed, largest, total = carried
    dims = tl.arange(0, HEAD_PADDED)
    for block in range(begin, end):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        known = tokens < context
        if MASKED:
            pages = tl.load(table_ptr + tokens // PAGE_TOKENS, mask=known, other=0)
        else:
            pages = tl.load(table_ptr + tokens // PAGE_TOKENS)
        slots = pages.to(tl.int64) * PAGE_TOKENS + tokens % PAGE_TOKENS
        at = (slots * (2 * KV_HEADS) + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        key_ptrs = layer_ptr + at
        value_ptrs = key_ptrs + KV_HEADS * HEAD_DIM
        if MASKED:
            inside = known[:, None] & (dims < HEAD_DIM)[None, :]
            keys = tl.load(key_ptrs, mask=inside, other=0.0).to(COMPUTE)
            values = tl.load(value_ptrs, mask=inside, other=0.0).to(COMPUTE)
        elif HEAD_PADDED == HEAD_DIM:
            keys = tl.load(key_ptrs).to(COMPUTE)
            values = tl.load(value_ptrs).to(COMPUTE)
        else:
            keys = tl.load(key_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0).to(COMPUTE)
            values = tl.load(value_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0).to(COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale  # [ROWS, BLOCK]
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOWED:
                seen &= tokens[None, :] > positions[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        finite = larger  # without a window block 0 comes first, which every row sees something of
        if WINDOWED:
            finite = tl.where(larger > float("-inf"), larger, 0.0)
        shrink = tl.exp2(largest - finite)
        weights = tl.exp2(scores - finite[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(COMPUTE), values, mixed * shrink[:, None], input_precision="ieee")
        largest = larger
    return mixed, largest, total


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill(
    queries_ptr,  # [rows, heads, HEAD_DIM]; rows query_stride apart
    layer_ptr,  # [slots, 2 * KV_HEADS, HEAD_DIM]
    table_ptr,  # [sequences, table_stride]
    row_starts_ptr,  # [sequences]
    starts_ptr,  # [sequences]
    counts_ptr,  # [sequences]
    out_ptr,  # as queries, rows out_stride apart
    query_stride,
    out_stride,
    table_stride,
    scale,  # of the softmax, times log2(e)
    window,  # tokens
    WINDOWED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARING: tl.constexpr,  # query heads a KV head
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile: ROWS // SHARING tokens, with the query heads of one token side by side
    BLOCK: tl.constexpr,  # keys an iteration
    COMPUTE: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest contexts first: the last round is then short
    sequence = tl.program_id(2)
    count = tl.load(counts_ptr + sequence)
    tile_tokens: tl.constexpr = ROWS // SHARING
    if tile * tile_tokens >= count:
        return
    start = tl.load(starts_ptr + sequence)
    first_row = tl.load(row_starts_ptr + sequence).to(tl.int64)

    row = tl.arange(0, ROWS)
    token = tile * tile_tokens + row // SHARING  # of the chunk
    head = kv_head * SHARING + row % SHARING
    dims = tl.arange(0, HEAD_PADDED)
    mask = ((row < tile_tokens * SHARING) & (token < count))[:, None] & (dims < HEAD_DIM)[None, :]
    column = head[:, None] * HEAD_DIM + dims[None, :]
    at = (first_row + token)[:, None] * query_stride + column
    queries = tl.load(queries_ptr + at, mask=mask, other=0.0).to(COMPUTE)

    end_token = tl.minimum((tile + 1) * tile_tokens, count)
    positions = start + tl.minimum(token, end_token - 1)  # rows that pad the tile do what its last token does
    context = start + end_token  # what the tile's last token sees
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    carried = (mixed, largest, total)
    if WINDOWED:
        begin = tl.maximum(start + tile * tile_tokens - window + 1, 0) // BLOCK
    else:
        begin = (start + tile * tile_tokens + 1) // BLOCK  # blocks before it hold only what the tile's first token sees
        carried = _scan(
            carried, queries, positions, layer_ptr, table_ptr, kv_head, scale, window, 0, begin, context,
            False, WINDOWED, KV_HEADS, HEAD_DIM, HEAD_PADDED, PAGE_TOKENS, BLOCK, COMPUTE,
        )  # fmt: skip
    mixed, largest, total = _scan(
        carried, queries, positions, layer_ptr, table_ptr, kv_head, scale, window, begin, tl.cdiv(context, BLOCK),
        context, True, WINDOWED, KV_HEADS, HEAD_DIM, HEAD_PADDED, PAGE_TOKENS, BLOCK, COMPUTE,
    )  # fmt: skip
    mixed = mixed / total[:, None]
    at = (first_row + token)[:, None] * out_stride + column
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill(
    queries: Tensor,
    layer: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    longest: int,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks of several sequences, whose own keys and values are in their pages already.

    queries: [rows, heads, head_dim], rows at any stride; layer: [slots, 2 * kv_heads, head_dim], keys first, where
    ``slot = page * page_tokens + offset``; block_table: int32 [sequences, pages], rows at any stride. All int32
    [sequences]: row_starts, the chunk's first row of ``queries``; starts, that row's position in its sequence (so many
    tokens come before it); counts, the chunk's rows. ``longest``: the largest of ``counts``; ``window``: how many of
    the last tokens a row sees, itself included. Returns ``out``, as queries; rows of no chunk are left as they were.
    """
    heads, head_dim = queries.shape[1:]
    kv_heads = layer.shape[1] // 2
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    if longest == 0:
        return out
    tile = _tile(head_dim, layer.dtype, _hopper(queries.device))
    constexprs = _constexprs(tile, heads, kv_heads, head_dim, page_tokens, window is not None, layer.dtype)
    tiles = triton.cdiv(longest, tile.rows // (heads // kv_heads))
    _prefill[(kv_heads, tiles, counts.shape[0])](
        queries, layer, block_table, row_starts, starts, counts, out,
        queries.stride(0), out.stride(0), block_table.stride(0), scale * LOG2_E, window or NO_WINDOW,
        **constexprs, num_warps=tile.warps, num_stages=STAGES,
    )  # fmt: skip
    return out


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True, slots=True)
class _Tile:
    """``rows`` queries by ``block`` keys, held by ``warps`` warps."""

    rows: int
    block: int
    warps: int


def _tile(head_dim: int, dtype: torch.dtype, hopper: bool) -> _Tile:
    """The largest tile that spills no registers (engine.kernels.aot tells).

    128 rows read keys and values from L2 about as fast as an H200 can deliver them; 64 would need twice that.
    """
    if triton.knobs.runtime.interpret:
        return _Tile(SMALLEST_TILE, SMALLEST_TILE, 4)
    if dtype == torch.float32:  # multiplied without tensor cores
        return _Tile(32, 16, 8)
    if hopper:
        return _Tile(128, 64 if head_dim <= 128 else 32, 8)
    return _Tile(128 if head_dim <= 128 else 64, 64 if head_dim <= 64 else 32, 8)


def _constexprs(
    tile: _Tile, heads: int, kv_heads: int, head_dim: int, page_tokens: int, windowed: bool, dtype: torch.dtype
) -> dict[str, object]:
    return {
        "WINDOWED": windowed,
        "KV_HEADS": kv_heads,
        "SHARING": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_PADDED": triton.next_power_of_2(head_dim),
        "PAGE_TOKENS": page_tokens,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "COMPUTE": tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[dtype],  # no bf16 products there
    }


def _specialisation(
    name: str, heads: int, kv_heads: int, head_dim: int, capability: int, windowed: bool = False
) -> Specialisation:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    tile = _tile(head_dim, dtype, hopper=capability >= 90)
    constexprs = _constexprs(tile, heads, kv_heads, head_dim, 16, windowed, dtype)
    signature = {
        "queries_ptr": f"*{name}", "layer_ptr": f"*{name}", "table_ptr": "*i32", "row_starts_ptr": "*i32",
        "starts_ptr": "*i32", "counts_ptr": "*i32", "out_ptr": f"*{name}",
        "query_stride": "i32", "out_stride": "i32", "table_stride": "i32", "scale": "fp32", "window": "i32",
        **dict.fromkeys(constexprs, "constexpr"),
    }  # fmt: skip
    label = f"paged_prefill[{name}, {heads}/{kv_heads} heads of {head_dim}{', window' if windowed else ''}]"
    aligned = frozenset(key for key, kind in signature.items() if kind.startswith("*")) | {"query_stride", "out_stride"}
    return Specialisation(label, _prefill, signature, constexprs, tile.warps, STAGES, aligned, (capability,))


SPECIALISATIONS = tuple(
    form
    for capability in (80, 90)
    for form in (
        _specialisation("bf16", 32, 8, 128, capability),
        _specialisation("bf16", 32, 8, 128, capability, windowed=True),
        _specialisation("fp16", 32, 8, 128, capability),
        _specialisation("bf16", 9, 3, 64, capability),
        _specialisation("bf16", 32, 32, 96, capability),
        _specialisation("bf16", 16, 1, 256, capability),
        _specialisation("fp32", 9, 3, 64, capability),
        _specialisation("fp32", 32, 8, 128, capability),
    )
)
