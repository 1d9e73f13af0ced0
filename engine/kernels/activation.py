"""SiLU-and-mul of SwiGLU (arXiv:2002.05202) over a stacked gate and up projection."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

BLOCK = 1024
WARPS = 4


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up_ptr + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + at, product.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * width], contiguous, to [rows, width]: SiLU of the first half times the second."""
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    if rows:
        grid = (rows, triton.cdiv(both // 2, BLOCK))
        _silu_mul[grid](gate_up, out, both // 2, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _specialisation(dtype: str) -> Specialisation:
    signature = {"gate_up_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "width": "i32", "BLOCK": "constexpr"}
    aligned = frozenset({"gate_up_ptr", "out_ptr", "width"})
    return Specialisation(f"silu_mul[{dtype}]", _silu_mul, signature, {"BLOCK": BLOCK}, WARPS, 1, aligned)


SPECIALISATIONS = (_specialisation("bf16"), _specialisation("fp32"))
