"""Rotary positions (arXiv:2104.09864) and the KV write in one pass over a step's fresh queries, keys and values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

HEADS_BLOCK = 8
WARPS = 4


@triton.jit
def _rope_write(
    qkv_ptr,  # [rows, heads + 2 * kv_heads, 2 * half], contiguous
    cos_ptr,  # [rows, 2 * half]
    sin_ptr,  # [rows, 2 * half], first half negated
    slots_ptr,  # [rows], a row of the cache or -1
    layer_ptr,  # [slots, 2 * kv_heads, 2 * half], contiguous
    query_weight_ptr,  # [2 * half] of the RMSNorm of each query head; not read unless NORM
    key_weight_ptr,
    heads,
    kv_heads,
    half,
    eps,
    NORM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    at = tl.arange(0, HALF_BLOCK)
    inside = (head < heads + 2 * kv_heads)[:, None] & (at < half)[None, :]
    rotated = (head < heads + kv_heads)[:, None]
    places = head[:, None] * 2 * half + at[None, :]  # [HEADS_BLOCK, HALF_BLOCK] of the lower halves
    own = qkv_ptr + row * (heads + 2 * kv_heads) * 2 * half
    lower = tl.load(own + places, mask=inside, other=0.0).to(tl.float32)
    upper = tl.load(own + places + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        query = (head < heads)[:, None]
        scale = tl.rsqrt((tl.sum(lower * lower, axis=1) + tl.sum(upper * upper, axis=1)) / (2 * half) + eps)[:, None]
        query_lower = tl.load(query_weight_ptr + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        query_upper = tl.load(query_weight_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        key_lower = tl.load(key_weight_ptr + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        key_upper = tl.load(key_weight_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        lower = tl.where(rotated, lower * scale * tl.where(query, query_lower, key_lower), lower)
        upper = tl.where(rotated, upper * scale * tl.where(query, query_upper, key_upper), upper)
    table = row * 2 * half + at
    cos_lower = tl.load(cos_ptr + table, mask=at < half, other=0.0).to(tl.float32)[None, :]
    cos_upper = tl.load(cos_ptr + table + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sin_lower = tl.load(sin_ptr + table, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sin_upper = tl.load(sin_ptr + table + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    turned_lower = tl.where(rotated, lower * cos_lower + upper * sin_lower, lower).to(qkv_ptr.dtype.element_ty)
    turned_upper = tl.where(rotated, upper * cos_upper + lower * sin_upper, upper).to(qkv_ptr.dtype.element_ty)
    tl.store(own + places, turned_lower, mask=inside & rotated)
    tl.store(own + places + half, turned_upper, mask=inside & rotated)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    kept = inside & ((head >= heads) & (slot + 0 * head >= 0))[:, None]
    cached = layer_ptr + slot * 2 * kv_heads * 2 * half + places - heads * 2 * half
    tl.store(cached, turned_lower, mask=kept)
    tl.store(cached + half, turned_upper, mask=kept)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    layer: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Rotates queries and keys in place, then writes keys and values to their rows of the cache.

    qkv: [rows, heads + 2 * kv_heads, head_dim]; cos, sin: [rows, head_dim] of :func:`engine.rope.rope_tables`;
    slots: [rows], any integer dtype, where -1 writes nothing; layer: [cache rows, 2 * kv_heads, head_dim], keys first.
    ``norms`` are the weights [head_dim] of the RMSNorm that query and key heads go through first, and its epsilon.
    All contiguous.
    """
    rows, total, head_dim = qkv.shape
    kv_heads = layer.shape[1] // 2
    query_weight, key_weight, eps = norms if norms is not None else (cos, cos, 0.0)
    if rows:
        _rope_write[(rows, triton.cdiv(total, HEADS_BLOCK))](
            qkv,
            cos,
            sin,
            slots,
            layer,
            query_weight,
            key_weight,
            total - 2 * kv_heads,
            kv_heads,
            head_dim // 2,
            eps,
            NORM=norms is not None,
            HEADS_BLOCK=HEADS_BLOCK,
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            num_warps=WARPS,
        )


def _specialisation(dtype: str, head_dim: int, norm: bool) -> Specialisation:
    pointers = ("qkv_ptr", "cos_ptr", "sin_ptr", "layer_ptr", "query_weight_ptr", "key_weight_ptr")
    signature = {name: f"*{dtype}" for name in pointers[:3]}
    signature |= {"slots_ptr": "*i64"} | {name: f"*{dtype}" for name in pointers[3:]}
    signature |= {"heads": "i32", "kv_heads": "i32", "half": "i32", "eps": "fp32"}
    constants = {"NORM": norm, "HEADS_BLOCK": HEADS_BLOCK, "HALF_BLOCK": triton.next_power_of_2(head_dim // 2)}
    return Specialisation(
        f"rope_write[{dtype}, head {head_dim}{', QK norm' if norm else ''}]",
        _rope_write,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        WARPS,
        1,
        frozenset({*pointers, "slots_ptr", "half"}),
    )


SPECIALISATIONS = (
    _specialisation("bf16", 64, False),
    _specialisation("bf16", 128, False),
    _specialisation("bf16", 128, True),
    _specialisation("fp32", 128, True),
)
