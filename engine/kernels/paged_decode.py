"""Decode attention over pages: one query token a sequence, its whole context read once.

Memory decides its speed. All query heads that share a KV head form one tile, so that head's keys and values are read
once (padded to 16 rows, the smallest a tensor core takes), and long contexts are split over several programs whose
partial results a second kernel merges by their log-sum-exps (Flash-Decoding: Dao et al., PyTorch blog, October 2023).

Nothing the host decides depends on the contexts: lengths and block tables are read on the device, so that one CUDA
graph serves every step of its batch size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

LOG2_E = math.log2(math.e)
NO_WINDOW = 1 << 30  # tokens; longer than any context
SMALLEST_TILE = 16  # rows and columns of a tensor-core product
MAX_SPLITS = 64  # the merge holds all of a head's partial results in registers
SPLIT_TOKENS = 256  # a shorter split spends over 3 % of its traffic on partial results (4 queries a KV head)
PROGRAMS_A_PROCESSOR = 16  # so that the last, partly filled round of programs costs little
MERGE_WARPS = 4
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# Without these, a kernel would be compiled anew, in the middle of serving, for a table of 32 pages after one of 30.
@triton.jit(do_not_specialize=["table_stride", "window"])
def _decode(
    queries_ptr,  # [sequences, heads, HEAD_DIM]; rows query_stride apart
    layer_ptr,  # [slots, 2 * KV_HEADS, HEAD_DIM]
    table_ptr,  # [sequences, table_stride]
    contexts_ptr,  # [sequences]
    out_ptr,  # as queries, rows out_stride apart; written when there is one split
    partial_ptr,  # [sequences, heads, splits, HEAD_DIM] float32; written when there are several
    lse_ptr,  # [sequences, heads, splits] float32, base 2; -inf for a split with nothing to do
    query_stride,
    out_stride,
    table_stride,
    scale,  # of the softmax, times log2(e)
    window,  # tokens
    KV_HEADS: tl.constexpr,
    SHARING: tl.constexpr,  # query heads a KV head
    SHARING_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens an iteration
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    heads = tl.arange(0, SHARING_PADDED)
    dims = tl.arange(0, HEAD_PADDED)
    head_mask = (heads < SHARING)[:, None] & (dims < HEAD_DIM)[None, :]
    rows = (kv_head * SHARING + heads)[:, None] * HEAD_DIM + dims[None, :]
    queries = tl.load(queries_ptr + sequence * query_stride + rows, mask=head_mask, other=0.0).to(COMPUTE)

    context = tl.load(contexts_ptr + sequence)
    first = tl.maximum(context - window, 0)
    first_block = first // BLOCK
    end_block = tl.cdiv(context, BLOCK)
    share = tl.cdiv(end_block - first_block, splits)
    begin = first_block + split * share
    end = tl.minimum(begin + share, end_block)

    largest = tl.full([SHARING_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([SHARING_PADDED], tl.float32)
    mixed = tl.zeros([SHARING_PADDED, HEAD_PADDED], tl.float32)
    for block in range(begin, end):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        seen = (tokens >= first) & (tokens < context)
        pages = tl.load(table_ptr + sequence * table_stride + tokens // PAGE_TOKENS, mask=seen, other=0)
        slots = pages.to(tl.int64) * PAGE_TOKENS + tokens % PAGE_TOKENS
        at = (slots * (2 * KV_HEADS) + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        inside = seen[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(layer_ptr + at, mask=inside, other=0.0).to(COMPUTE)  # [BLOCK, HEAD_PADDED]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))  # [SHARING_PADDED, BLOCK]
        # Every block holds a token that is seen, so that this is finite from the first block on.
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(layer_ptr + at + KV_HEADS * HEAD_DIM, mask=inside, other=0.0).to(COMPUTE)
        mixed = tl.dot(weights.to(COMPUTE), values, mixed * shrink[:, None], input_precision="ieee")
        largest = larger

    total = tl.where(total > 0.0, total, 1.0)  # a row that pads its batch has no context: zeros come out
    mixed = mixed / total[:, None]
    if SPLIT:
        at = (sequence * KV_HEADS * SHARING + kv_head * SHARING + heads) * splits + split
        tl.store(lse_ptr + at, largest + tl.log2(total), mask=heads < SHARING)
        if end > begin:
            tl.store(partial_ptr + at[:, None] * HEAD_DIM + dims[None, :], mixed, mask=head_mask)
    else:
        tl.store(out_ptr + sequence * out_stride + rows, mixed.to(out_ptr.dtype.element_ty), mask=head_mask)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial_ptr,  # [sequences, heads, splits, HEAD_DIM] float32
    lse_ptr,  # [sequences, heads, splits] float32
    out_ptr,  # [sequences, heads, HEAD_DIM]; rows out_stride apart
    out_stride,
    splits,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    parts = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, HEAD_PADDED)
    at = (sequence * tl.num_programs(1) + head) * splits + parts
    lse = tl.load(lse_ptr + at, mask=parts < splits, other=float("-inf"))
    inside = (parts < splits)[:, None] & (dims < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest > float("-inf"), largest, 0.0))  # 0 for -inf
    # What a split with nothing to do left in its place is whatever memory held, NaNs too.
    partial = tl.where((weights > 0.0)[:, None], partial, 0.0)
    total = tl.sum(weights, 0)
    mixed = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    at = out_ptr + sequence * out_stride + head * HEAD_DIM + dims
    tl.store(at, mixed.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def choose_splits(sequences: int, kv_heads: int, context: int, processors: int) -> int:
    """How many programs share one sequence and KV head, at least 1. Pure.

    ``context``: the longest that may come, in tokens; ``processors``: multiprocessors of the GPU. A captured graph must
    give the longest it will ever serve: splits that find nothing to do cost about a microsecond.
    """
    wanted = -(-PROGRAMS_A_PROCESSOR * processors // (sequences * kv_heads))
    return max(1, min(wanted, -(-context // SPLIT_TOKENS), MAX_SPLITS))


def contexts_of_all_kernels(kv_heads: int, longest: int, processors: int) -> tuple[int, ...]:
    """Contexts, in tokens, of lone decodes that need between them every kernel that decodes of at most ``longest``
    tokens can, however many they are. Pure.

    The merge is compiled for each power of two of splits, and a lone decode is split most.
    """
    most = choose_splits(1, kv_heads, longest, processors)
    powers = [1 << power for power in range(most.bit_length())]
    return tuple((splits - 1) * SPLIT_TOKENS + 1 for splits in sorted({*powers, most}))


def workspace_elements(sequences: int, heads: int, head_dim: int, splits: int) -> int:
    """float32 elements that :func:`paged_decode` needs to work in; 0 for one split."""
    return sequences * heads * splits * (head_dim + 1) if splits > 1 else 0


def paged_decode(
    queries: Tensor,
    layer: Tensor,
    block_table: Tensor,
    contexts: Tensor,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    splits: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token a sequence over its pages.

    queries: [sequences, heads, head_dim], rows at any stride; layer: [slots, 2 * kv_heads, head_dim], keys first, where
    ``slot = page * page_tokens + offset``; block_table: int32 [sequences, pages], rows at any stride; contexts: int32
    [sequences], tokens that the query sees, itself included (0 for a row that only pads the batch: zeros come out);
    ``window``: how many of the last tokens are seen; ``splits``: 1 to 64, see :func:`choose_splits`; workspace: float32
    of :func:`workspace_elements`, made here if not given. Returns ``out``, as queries.
    """
    sequences, heads, head_dim = queries.shape
    kv_heads = layer.shape[1] // 2
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    if sequences == 0:
        return out
    if workspace is None:
        elements = workspace_elements(sequences, heads, head_dim, splits)
        workspace = torch.empty(elements, dtype=torch.float32, device=queries.device)
    partial, lse = _shares(workspace, out, sequences * heads * splits, head_dim, splits)
    constexprs, warps, stages = _constants(heads, kv_heads, head_dim, page_tokens, splits > 1, layer.dtype)
    _decode[(sequences, kv_heads, splits)](
        queries, layer, block_table, contexts, out, partial, lse,
        queries.stride(0), out.stride(0), block_table.stride(0), scale * LOG2_E, window or NO_WINDOW,
        **constexprs, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _merge[(sequences, heads)](
            partial, lse, out, out.stride(0), splits,
            HEAD_DIM=head_dim, HEAD_PADDED=triton.next_power_of_2(head_dim),
            SPLITS_PADDED=triton.next_power_of_2(splits), num_warps=MERGE_WARPS,
        )  # fmt: skip
    return out


def _shares(workspace: Tensor, out: Tensor, parts: int, head_dim: int, splits: int) -> tuple[Tensor, Tensor]:
    """Room for partial results and for their log-sum-exps; any pointer will do for one split, which writes neither."""
    if splits == 1:
        return out, out
    return workspace[: parts * head_dim], workspace[parts * head_dim : parts * (head_dim + 1)]


def _constants(
    heads: int, kv_heads: int, head_dim: int, page_tokens: int, split: bool, dtype: torch.dtype
) -> tuple[dict[str, object], int, int]:
    """Compile-time constants, warps and pipeline stages.

    Five stages are two for each of the loads that feed another (page, then keys and values) and one to compute: two
    blocks of 32 KiB a program are in flight, and three programs fit a multiprocessor of an H200, which needs about 30
    KiB in flight to cover its latency.
    """
    padded = triton.next_power_of_2(head_dim)
    block = max(SMALLEST_TILE, 8192 // padded // (4 if dtype == torch.float32 else 1))
    if triton.knobs.runtime.interpret:  # bf16 products are wrong there
        compute, block = tl.float32, SMALLEST_TILE
    else:
        compute = TRITON_DTYPES[dtype]
    constexprs: dict[str, object] = {
        "KV_HEADS": kv_heads,
        "SHARING": heads // kv_heads,
        "SHARING_PADDED": max(SMALLEST_TILE, triton.next_power_of_2(heads // kv_heads)),
        "HEAD_DIM": head_dim,
        "HEAD_PADDED": padded,
        "PAGE_TOKENS": page_tokens,
        "BLOCK": block,
        "SPLIT": split,
        "COMPUTE": compute,
    }
    return constexprs, 4, 5


_POINTERS = frozenset({"queries_ptr", "layer_ptr", "table_ptr", "contexts_ptr", "out_ptr", "partial_ptr"})


def _specialisation(name: str, heads: int, kv_heads: int, head_dim: int, split: bool) -> Specialisation:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    constexprs, warps, stages = _constants(heads, kv_heads, head_dim, 16, split, dtype)
    unsplit = "fp32" if split else name
    signature = {
        "queries_ptr": f"*{name}", "layer_ptr": f"*{name}", "table_ptr": "*i32", "contexts_ptr": "*i32",
        "out_ptr": f"*{name}", "partial_ptr": f"*{unsplit}", "lse_ptr": f"*{unsplit}",
        "query_stride": "i32", "out_stride": "i32", "table_stride": "i32", "scale": "fp32", "window": "i32",
        **dict.fromkeys(constexprs, "constexpr"),
    }  # fmt: skip
    label = f"paged_decode[{name}, {heads}/{kv_heads} heads of {head_dim}{', split' if split else ''}]"
    aligned = _POINTERS | {"query_stride", "out_stride"}
    return Specialisation(label, _decode, signature, constexprs, warps, stages, aligned)


def _merge_specialisation(splits: int) -> Specialisation:
    constexprs = {"HEAD_DIM": 128, "HEAD_PADDED": 128, "SPLITS_PADDED": splits}
    signature = {
        "partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "out_stride": "i32", "splits": "i32",
        **dict.fromkeys(constexprs, "constexpr"),
    }  # fmt: skip
    aligned = frozenset({"partial_ptr", "out_ptr", "out_stride"})
    return Specialisation(
        f"paged_decode merge[{splits} splits]", _merge, signature, constexprs, MERGE_WARPS, 3, aligned=aligned
    )


SPECIALISATIONS = (
    _specialisation("bf16", 32, 8, 128, split=True),
    _specialisation("bf16", 32, 8, 128, split=False),
    _specialisation("fp16", 32, 8, 128, split=True),
    _specialisation("bf16", 9, 3, 64, split=True),
    _specialisation("bf16", 32, 32, 96, split=True),
    _specialisation("bf16", 16, 1, 256, split=True),
    _specialisation("fp32", 9, 3, 64, split=True),
    _specialisation("fp32", 32, 8, 128, split=True),
    _merge_specialisation(8),
    _merge_specialisation(MAX_SPLITS),
)
