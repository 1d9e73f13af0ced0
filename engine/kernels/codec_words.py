"""A codec's exact kernels: values between pages and the wire's order as they are, or as byte planes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

WARPS = 4
TILE = 2048  # words of one program


@triton.jit
def _places(slots_ptr, count, row_stride, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program's words lie in the cache and on the wire: [ROWS, COLUMNS], and which exist."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots_ptr + token, mask=token < count, other=0)
    wire = (head.to(tl.int64) * count + token) * head_dim + channel
    return slot * row_stride + head * head_dim + channel, wire, (token < count) & (channel < head_dim)


@triton.jit(do_not_specialize=["count"])
def _gather(rows_ptr, slots_ptr, words_ptr, count, row_stride, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    cached, wire, present = _places(slots_ptr, count, row_stride, head_dim, ROWS, COLUMNS)
    tl.store(words_ptr + wire, tl.load(rows_ptr + cached, mask=present, other=0), mask=present)


@triton.jit(do_not_specialize=["count"])
def _scatter(rows_ptr, slots_ptr, words_ptr, count, row_stride, head_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    cached, wire, present = _places(slots_ptr, count, row_stride, head_dim, ROWS, COLUMNS)
    tl.store(rows_ptr + cached, tl.load(words_ptr + wire, mask=present, other=0), mask=present)


@triton.jit(do_not_specialize=["count"])
def _split(
    rows_ptr, slots_ptr, low_ptr, middle_ptr, top_ptr, count, row_stride, head_dim,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``WIDE``: words of four bytes, whose lower two stay together; else of two, which have no middle plane."""
    cached, wire, present = _places(slots_ptr, count, row_stride, head_dim, ROWS, COLUMNS)
    word = tl.load(rows_ptr + cached, mask=present, other=0).to(tl.int32)
    if WIDE:
        word = (word << 1) | ((word >> 31) & 1)
        tl.store(low_ptr + wire, word.to(tl.int16), mask=present)
        tl.store(middle_ptr + wire, (word >> 16).to(tl.uint8), mask=present)
        tl.store(top_ptr + wire, (word >> 24).to(tl.uint8), mask=present)
    else:
        word = (word << 1) | ((word >> 15) & 1)
        tl.store(low_ptr + wire, word.to(tl.uint8), mask=present)
        tl.store(top_ptr + wire, (word >> 8).to(tl.uint8), mask=present)


@triton.jit(do_not_specialize=["count"])
def _join(
    rows_ptr, slots_ptr, low_ptr, middle_ptr, top_ptr, count, row_stride, head_dim,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    cached, wire, present = _places(slots_ptr, count, row_stride, head_dim, ROWS, COLUMNS)
    top = tl.load(top_ptr + wire, mask=present, other=0).to(tl.int32)
    low = tl.load(low_ptr + wire, mask=present, other=0).to(tl.int32)
    if WIDE:
        middle = tl.load(middle_ptr + wire, mask=present, other=0).to(tl.int32)
        word = (top << 24) | (middle << 16) | (low & 0xFFFF)
        tl.store(rows_ptr + cached, ((word >> 1) & 0x7FFFFFFF) | (word << 31), mask=present)
    else:
        word = (top << 8) | low
        tl.store(rows_ptr + cached, ((word >> 1) | ((word & 1) << 15)).to(tl.int16), mask=present)


def gather_words(rows: Tensor, slots: Tensor, words: Tensor) -> None:
    """rows: [cache rows, heads, head_dim], heads side by side; words: [heads, count, head_dim] of the same dtype."""
    _launch(_gather, _bits(rows), slots, [_bits(words)])


def scatter_words(words: Tensor, rows: Tensor, slots: Tensor) -> None:
    _launch(_scatter, _bits(rows), slots, [_bits(words)])


def split_words(rows: Tensor, slots: Tensor, planes: list[Tensor]) -> None:
    """planes: least significant first, [heads, count, head_dim] each: int16, uint8, uint8 of float32; uint8 twice of
    bfloat16."""
    _launch(_split, _bits(rows), slots, [planes[0], planes[-2], planes[-1]], WIDE=rows.element_size() == 4)


def join_words(planes: list[Tensor], rows: Tensor, slots: Tensor) -> None:
    _launch(_join, _bits(rows), slots, [planes[0], planes[-2], planes[-1]], WIDE=rows.element_size() == 4)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def _launch(kernel: Any, rows: Tensor, slots: Tensor, others: list[Tensor], **constants: bool) -> None:
    count, heads, head_dim = slots.shape[0], rows.shape[1], rows.shape[2]
    columns = triton.next_power_of_2(head_dim)
    tall = max(1, TILE // columns)
    kernel[(triton.cdiv(count, tall), heads)](
        rows, slots, *others, count, rows.stride(0), head_dim, **constants,
        ROWS=tall, COLUMNS=columns, num_warps=WARPS,
    )  # fmt: skip


def _specialisation(name: str, fn: Any, wide: bool) -> Specialisation:
    tile = {"ROWS": TILE // 128, "COLUMNS": 128} | ({"WIDE": wide} if "WIDE" in fn.arg_names else {})
    word = "*i32" if wide else "*i16"
    kinds = {
        "rows_ptr": word, "words_ptr": word, "slots_ptr": "*i64", "low_ptr": "*i16" if wide else "*u8",
        "middle_ptr": "*u8", "top_ptr": "*u8",
    }  # fmt: skip
    signature = {argument: kinds.get(argument, "i32") for argument in fn.arg_names if argument not in tile}
    aligned = frozenset({"rows_ptr", "slots_ptr", "row_stride", "head_dim"})
    return Specialisation(
        f"{name}[{4 if wide else 2} bytes]", fn, signature | dict.fromkeys(tile, "constexpr"), tile, WARPS, 3, aligned
    )


SPECIALISATIONS = tuple(
    _specialisation(name, fn, wide)
    for name, fn in (("gather", _gather), ("scatter", _scatter), ("split", _split), ("join", _join))
    for wide in (False, True)
)
