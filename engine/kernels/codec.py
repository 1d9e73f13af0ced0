"""What a KV codec asks of the accelerator, so that a handoff's bytes leave the pages already encoded.

A *block* is one layer's K and V of some tokens as ``kvtransfer`` sends them: a flat uint8 tensor in the wire's
canonical order, K before V, then heads, then tokens. Where a token's KV lies is given as *slots*: rows of the cache.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

TOKENS_BLOCK = 32
WARPS = 4
GROUP = 64  # values that share a scale, at most
_REFUSED = tl.constexpr(2.0**127)  # its scale, rounded up, would decode to infinity


class BlockKernels(Protocol):
    """One codec's two halves: fused gather, quantise and pack, and fused unpack, dequantise and scatter."""

    def block_bytes(self, tokens: int, kv_heads: int, head_dim: int) -> int:
        """Size of a block of ``tokens``, before any entropy coding."""

    def pack(self, layer: Tensor, slots: Tensor, block: Tensor) -> None:
        """Fills ``block`` [block_bytes] from ``layer`` [cache rows, 2 * kv_heads, head_dim] at ``slots`` [tokens].

        No host sync. Values that cannot be quantised leave an infinite scale in the block, which the sender refuses.
        """

    def unpack(self, block: Tensor, layer: Tensor, slots: Tensor) -> None:
        """Writes the block's K and V to ``layer`` at ``slots``, in the layer's dtype."""


@triton.jit(do_not_specialize=["tokens"])  # one compilation serves every length
def _pack_int8(
    layer_ptr, slots_ptr, scales_ptr, levels_ptr, tokens, heads, group, TOKENS: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    """One program: ``TOKENS`` tokens of one head and one group of its values. ``heads`` counts K's and V's."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, place, groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    at = tl.arange(0, GROUP_BLOCK)
    present = token < tokens
    inside = present[:, None] & (at < group)[None, :]
    slot = tl.load(slots_ptr + token, mask=present, other=0).to(tl.int64)
    row = (slot * heads + head) * (groups * group) + place * group
    x = tl.load(layer_ptr + row[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
    wild = tl.max((~(tl.abs(x) < _REFUSED)).to(tl.int32), axis=1)  # NaN too, which a maximum may lose
    largest = tl.where(wild > 0, float("inf"), tl.max(tl.abs(x), axis=1))
    # Rounded up to bfloat16, so that no level passes 127.
    bits = tl.math.div_rn(largest, 127.0).to(tl.int32, bitcast=True)
    bits = tl.where(wild > 0, bits, (bits + 0xFFFF) & -0x10000)
    step = tl.where(bits > 0, bits.to(tl.float32, bitcast=True), 1.0)
    levels = tl.math.div_rn(tl.where(wild[:, None] > 0, 0.0, x), step[:, None] + tl.zeros_like(x))
    levels = (levels + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even, as numpy's rint
    levels = tl.minimum(tl.maximum(levels, -127.0), 127.0)
    packed = head.to(tl.int64) * tokens + token
    tl.store(scales_ptr + packed * groups + place, (bits >> 16).to(tl.int16), mask=present)
    out = packed[:, None] * (groups * group) + place * group + at[None, :]
    tl.store(levels_ptr + out, levels.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _unpack_int8(
    scales_ptr, levels_ptr, layer_ptr, slots_ptr, tokens, heads, group, TOKENS: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, place, groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    at = tl.arange(0, GROUP_BLOCK)
    present = token < tokens
    inside = present[:, None] & (at < group)[None, :]
    packed = head.to(tl.int64) * tokens + token
    bits = tl.load(scales_ptr + packed * groups + place, mask=present, other=0).to(tl.int32) << 16
    source = packed[:, None] * (groups * group) + place * group + at[None, :]
    levels = tl.load(levels_ptr + source, mask=inside, other=0).to(tl.float32)
    x = levels * bits.to(tl.float32, bitcast=True)[:, None]
    slot = tl.load(slots_ptr + token, mask=present, other=0).to(tl.int64)
    row = (slot * heads + head) * (groups * group) + place * group
    tl.store(layer_ptr + row[:, None] + at[None, :], x.to(layer_ptr.dtype.element_ty), mask=inside)


class Int8Blocks:
    """The codec ``int8``. KV that is not finite, or of 2^127 and more, cannot be quantised.

    Per token, head and group of at most 64 values a bfloat16 scale and one signed byte a value: all scales first,
    [2, kv_heads, tokens, groups], then all levels, [2, kv_heads, tokens, head_dim].
    """

    def block_bytes(self, tokens: int, kv_heads: int, head_dim: int) -> int:
        return 2 * kv_heads * tokens * (head_dim + 2 * (head_dim // group_of(head_dim)))

    def pack(self, layer: Tensor, slots: Tensor, block: Tensor) -> None:
        scales, levels = self._parts(block, layer, slots)
        self._launch(_pack_int8, (layer, slots, scales, levels), layer, slots)

    def unpack(self, block: Tensor, layer: Tensor, slots: Tensor) -> None:
        scales, levels = self._parts(block, layer, slots)
        self._launch(_unpack_int8, (scales, levels, layer, slots), layer, slots)

    def _launch(self, kernel: Any, operands: tuple[Tensor, ...], layer: Tensor, slots: Tensor) -> None:
        """One program for each block of tokens, head and group."""
        tokens, heads, head_dim = slots.shape[0], layer.shape[1], layer.shape[2]
        group = group_of(head_dim)
        if tokens:
            kernel[(triton.cdiv(tokens, TOKENS_BLOCK), heads, head_dim // group)](
                *operands,
                tokens,
                heads,
                group,
                TOKENS=TOKENS_BLOCK,
                GROUP_BLOCK=triton.next_power_of_2(group),
                num_warps=WARPS,
            )

    def _parts(self, block: Tensor, layer: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Scales' bits as int16, and levels. Raises ValueError for a block of the wrong size."""
        tokens, heads, head_dim = slots.shape[0], layer.shape[1], layer.shape[2]
        wanted = self.block_bytes(tokens, heads // 2, head_dim)
        if block.dtype != torch.uint8 or block.shape != (wanted,):
            raise ValueError(f"block of {tuple(block.shape)} {block.dtype}, expected {wanted} bytes")
        levels = heads * tokens * head_dim
        return block[: wanted - levels].view(torch.int16), block[wanted - levels :].view(torch.int8)


def group_of(head_dim: int) -> int:
    """The largest divisor of ``head_dim`` that is at most 64."""
    return next(size for size in range(min(GROUP, head_dim), 0, -1) if head_dim % size == 0)


def _specialisation(name: str, fn: object, dtype: str) -> Specialisation:
    pointers = {"scales_ptr": "*i16", "levels_ptr": "*i8", "layer_ptr": f"*{dtype}", "slots_ptr": "*i64"}
    constants = {"TOKENS": TOKENS_BLOCK, "GROUP_BLOCK": GROUP}
    signature = {**pointers, "tokens": "i32", "heads": "i32", "group": "i32"} | dict.fromkeys(constants, "constexpr")
    return Specialisation(f"{name}[{dtype}]", fn, signature, constants, WARPS, 1, frozenset({*pointers, "group"}))


SPECIALISATIONS = tuple(
    _specialisation(name, fn, dtype)
    for name, fn in (("pack_int8", _pack_int8), ("unpack_int8", _unpack_int8))
    for dtype in ("bf16", "fp32")
)
