"""RMSNorm (arXiv:1910.07467), alone and after the residual sum: one program a row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation


@triton.jit
def _norm(hidden_ptr, weight_ptr, out_ptr, columns, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    hidden = tl.load(hidden_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + at, (hidden * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(hidden_ptr, delta_ptr, weight_ptr, out_ptr, columns, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    hidden = tl.load(hidden_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    # The norm is of the sum as it is stored: later layers see that one, and the twin rounds there too.
    total = (hidden + delta).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row + at, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / columns + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + at, (total * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension. hidden: [..., columns], weight: [columns]. Returns as ``hidden``, contiguous."""
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    columns = hidden.shape[-1]
    rows = hidden.numel() // columns
    if rows:
        _norm[(rows,)](hidden, weight, out, columns, eps, BLOCK=_block(columns), num_warps=_warps(columns))
    return out


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``hidden + delta``, which replaces ``hidden``, and its RMSNorm. Both [rows, columns] and contiguous."""
    out = torch.empty_like(hidden)
    rows, columns = hidden.shape
    if rows:
        _add_norm[(rows,)](hidden, delta, weight, out, columns, eps, BLOCK=_block(columns), num_warps=_warps(columns))
    return hidden, out


def _block(columns: int) -> int:
    return int(triton.next_power_of_2(columns))


def _warps(columns: int) -> int:
    """About eight values a thread: one 16-byte load of bf16."""
    return min(16, max(1, _block(columns) // 256))


def _specialisation(dtype: str, columns: int) -> tuple[Specialisation, Specialisation]:
    plain = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    rest = {"columns": "i32", "eps": "fp32", "BLOCK": "constexpr"}
    block, warps = {"BLOCK": _block(columns)}, _warps(columns)
    aligned = frozenset({"hidden_ptr", "delta_ptr", "weight_ptr", "out_ptr", "columns"})
    summed = {"hidden_ptr": plain["hidden_ptr"], "delta_ptr": f"*{dtype}", **plain}
    return (
        Specialisation(f"norm[{dtype}, {columns}]", _norm, plain | rest, block, warps, 1, aligned - {"delta_ptr"}),
        Specialisation(f"add_norm[{dtype}, {columns}]", _add_norm, summed | rest, block, warps, 1, aligned),
    )


SPECIALISATIONS = (
    *_specialisation("bf16", 128),  # heads of Qwen3
    *_specialisation("bf16", 576),  # SmolLM2-135M
    *_specialisation("bf16", 4096),
    *_specialisation("bf16", 16384),  # Llama 3.1 405B
    *_specialisation("fp32", 4096),
)
