"""What a KV codec asks of the accelerator, so that a handoff's bytes leave the pages already encoded.

Each call reads or writes the pages themselves: gather, quantise and pack are one pass over the values after the one
that finds their scales; unpack, dequantise and scatter are one pass. The bytes are those of the codecs' plain torch,
which is these kernels' twin (``kvtransfer.codecs.reference``; tests hold them to it).

Throughout, ``rows`` is K's or V's half of a layer's cache, [cache rows, kv_heads, head_dim] with its heads side by
side; ``slots`` [count] int64 says which row holds each token. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.codec_words import gather_words, join_words, scatter_words, split_words
from engine.kernels.specialisation import Specialisation

Arrays: TypeAlias = tuple[Tensor, Tensor, Tensor]  # scales, middles (int16), levels (uint8)

TOKENS_BLOCK = 32
WARPS = 4
_REFUSED = tl.constexpr(2.0**127)  # its scale, rounded up, would decode to infinity
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even


class Grid(Protocol):
    """What the kernels need of ``kvtransfer.codecs.grid.Grid``."""

    @property
    def width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def e4m3(self) -> bool: ...
    @property
    def top(self) -> int: ...
    @property
    def largest(self) -> float: ...
    def group(self, head_dim: int) -> int: ...


@triton.jit
def _rounded_up(magnitude, wild):
    """Bits of a magnitude as bfloat16, away from zero; infinite where ``wild``."""
    bits = (magnitude.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.where(wild > 0, 0x7F800000, bits)


# One compilation serves every length, and scales that begin anywhere in a block.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scales_ptr"])
def _token_scales(
    rows_ptr, slots_ptr, scales_ptr, count, row_stride, group, largest, TOKENS: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    """One program: ``TOKENS`` tokens of one head and one group of its values."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, place, groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    at = tl.arange(0, GROUP_BLOCK)
    present = token < count
    slot = tl.load(slots_ptr + token, mask=present, other=0)
    row = slot * row_stride + (head * groups + place) * group
    x = tl.load(rows_ptr + row[:, None] + at[None, :], mask=present[:, None] & (at < group)[None, :], other=0.0)
    x = tl.abs(x.to(tl.float32))
    wild = tl.max((~(x < _REFUSED)).to(tl.int32), axis=1)  # NaN too, which a maximum may lose
    bits = _rounded_up(tl.math.div_rn(tl.max(x, axis=1), largest), wild)
    tl.store(scales_ptr + (head.to(tl.int64) * count + token) * groups + place, (bits >> 16).to(tl.int16), mask=present)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scales_ptr", "middles_ptr"])
def _channel_scales(
    rows_ptr, slots_ptr, scales_ptr, middles_ptr, count, row_stride, head_dim, half_top,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ``CHANNELS`` channels of one head over one group of tokens."""
    group, head = tl.program_id(0), tl.program_id(1)
    token = group * GROUP + tl.arange(0, GROUP)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    present, kept = token < count, channel < head_dim
    slot = tl.load(slots_ptr + token, mask=present, other=0)
    inside = present[:, None] & kept[None, :]
    x = tl.load(rows_ptr + (slot * row_stride)[:, None] + (head * head_dim + channel)[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    wild = tl.max((~(tl.abs(x) < _REFUSED)).to(tl.int32), axis=0)
    x = tl.where(wild[None, :] > 0, 0.0, x)
    low = tl.min(tl.where(present[:, None], x, float("inf")), axis=0)
    high = tl.max(tl.where(present[:, None], x, float("-inf")), axis=0)
    middle_bits = (high * 0.5 + low * 0.5 + 0.0).to(tl.int32, bitcast=True) & -0x10000  # towards zero
    middle = middle_bits.to(tl.float32, bitcast=True)
    reach = tl.maximum(tl.maximum(high - middle, middle - low), 0.0)
    bits = _rounded_up(tl.math.div_rn(reach, half_top), wild)
    out = (head.to(tl.int64) * tl.num_programs(0) + group) * head_dim + channel
    tl.store(scales_ptr + out, (bits >> 16).to(tl.int16), mask=kept)
    tl.store(middles_ptr + out, (middle_bits >> 16).to(tl.int16), mask=kept)


@triton.jit
def _to_e4m3(x):
    """Nearest, ties to even; |x| at most 448."""
    word = x.to(tl.int32, bitcast=True)
    magnitude = word & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # 120 exponents of 8
    tiny = tl.abs(x) + 16384.0  # steps of 2^-9
    tiny = tiny.to(tl.int32, bitcast=True) - 0x46800000  # of 16384
    return tl.where(magnitude < 0x3C800000, tiny, normal) | ((word >> 24) & 0x80)


@triton.jit
def _widened(words):
    return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scale_index(head, token, channel, count, head_dim, GROUP: tl.constexpr, CHANNELWISE: tl.constexpr):
    """Which scale is a value's: GROUP tokens of a channel share one, or GROUP values of a token."""
    if CHANNELWISE:
        index = (head.to(tl.int64) * tl.cdiv(count, GROUP) + token // GROUP) * head_dim + channel
    else:
        index = (head.to(tl.int64) * count + token) * (head_dim // GROUP) + channel // GROUP
    return index


@triton.jit(
    do_not_specialize=["count", "size", "shift", "top"], do_not_specialize_on_alignment=["scales_ptr", "middles_ptr"]
)
def _pack(
    rows_ptr, slots_ptr, scales_ptr, middles_ptr, levels_ptr, count, size, row_stride, head_dim, head_bytes,
    centre, top, shift, WIDTH: tl.constexpr, GROUP: tl.constexpr, CHANNELWISE: tl.constexpr, E4M3: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS * head_dim`` bytes of one head. Byte j holds levels j, j + size, ... of the head.

    ``shift``: how many low bits of a level are left out; ``WIDTH`` bits above them are kept.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    byte = row[:, None] * head_dim + column[None, :]
    inside = (byte < size) & (column < head_dim)[None, :]
    packed = tl.zeros((ROWS, COLUMNS), tl.int32)
    for part in tl.static_range(8 // WIDTH):
        value = byte + part * size
        token, channel = value // head_dim, value % head_dim
        present = inside & (token < count)
        slot = tl.load(slots_ptr + token, mask=present, other=0)
        x = tl.load(rows_ptr + slot * row_stride + head * head_dim + channel, mask=present, other=0.0).to(tl.float32)
        index = _scale_index(head, token, channel, count, head_dim, GROUP, CHANNELWISE)
        step = _widened(tl.load(scales_ptr + index, mask=present, other=0))
        step = tl.where(step > 0, step, 1.0)
        if CHANNELWISE:
            x = x - _widened(tl.load(middles_ptr + index, mask=present, other=0))
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # the scale says that the block is refused
        scaled = tl.math.div_rn(x, step)
        if E4M3:
            level = _to_e4m3(scaled)
        elif WIDTH == 8:
            level = ((scaled + _ROUNDER) - _ROUNDER).to(tl.int32)
            level = tl.minimum(tl.maximum(level, -top), top) & 0xFF
        else:
            level = ((scaled + centre + _ROUNDER) - _ROUNDER).to(tl.int32)
            level = (tl.minimum(tl.maximum(level, 0), top) >> shift) & ((1 << WIDTH) - 1)
        packed |= tl.where(present, level, 0) << (part * WIDTH)
    tl.store(levels_ptr + head.to(tl.int64) * head_bytes + byte, packed.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scales_ptr", "middles_ptr"])
def _unpack(
    rows_ptr, slots_ptr, scales_ptr, middles_ptr, levels_ptr, count, row_stride, head_dim, head_bytes, centre,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, CHANNELWISE: tl.constexpr, E4M3: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` tokens of one head."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    present = (token < count) & (channel < head_dim)
    value = token * head_dim + channel
    levels_ptr += head.to(tl.int64) * head_bytes
    if WIDTH == 6:  # the upper four bits, then the lower two
        upper = tl.cdiv(count * head_dim, 2)
        level = (_level(levels_ptr, value, upper, present, 4) << 2) | _level(
            levels_ptr + upper, value, tl.cdiv(count * head_dim, 4), present, 2
        )
    else:
        level = _level(levels_ptr, value, tl.cdiv(count * head_dim, 8 // WIDTH), present, WIDTH)
    if E4M3:
        x = ((level & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        x = (x.to(tl.int32, bitcast=True) | ((level & 0x80) << 24)).to(tl.float32, bitcast=True)
    elif WIDTH == 8:
        x = ((level << 24) >> 24).to(tl.float32)
    else:
        x = level.to(tl.float32) - centre
    index = _scale_index(head, token, channel, count, head_dim, GROUP, CHANNELWISE)
    x = x * _widened(tl.load(scales_ptr + index, mask=present, other=0))
    if CHANNELWISE:
        x += _widened(tl.load(middles_ptr + index, mask=present, other=0))
    slot = tl.load(slots_ptr + token, mask=token < count, other=0)
    out = rows_ptr + slot * row_stride + head * head_dim + channel
    tl.store(out, x.to(rows_ptr.dtype.element_ty), mask=present)


@triton.jit
def _level(levels_ptr, value, size, present, WIDTH: tl.constexpr):
    """Level ``value`` of a head whose levels take ``size`` bytes at ``WIDTH`` bits each."""
    part = value // size
    byte = tl.load(levels_ptr + value - part * size, mask=present, other=0).to(tl.int32)
    return (byte >> (part * WIDTH)) & ((1 << WIDTH) - 1)


class PagedKernels:
    """``kvtransfer.codecs.paged.Kernels`` on an NVIDIA GPU."""

    def quantise(self, rows: Tensor, slots: Tensor, grid: Grid, arrays: Arrays) -> None:
        """Fills ``arrays``. What cannot be quantised leaves an infinite scale."""
        scales, middles, levels = arrays
        count, heads, head_dim = slots.shape[0], rows.shape[1], rows.shape[2]
        group = grid.group(head_dim)
        if grid.tokens:
            channels = min(64, triton.next_power_of_2(head_dim))
            programs = (triton.cdiv(count, group), heads, triton.cdiv(head_dim, channels))
            _channel_scales[programs](
                rows, slots, scales, middles, count, rows.stride(0), head_dim, grid.largest / 2,
                GROUP=group, CHANNELS=channels, num_warps=WARPS,
            )  # fmt: skip
        else:
            _token_scales[(triton.cdiv(count, TOKENS_BLOCK), heads, head_dim // group)](
                rows, slots, scales, count, rows.stride(0), group, grid.largest,
                TOKENS=TOKENS_BLOCK, GROUP_BLOCK=triton.next_power_of_2(group), num_warps=WARPS,
            )  # fmt: skip
        head_bytes, at = levels.shape[0] // heads, 0
        for width, shift in ((4, 2), (2, 0)) if grid.width == 6 else ((grid.width, 0),):
            size = triton.cdiv(count * head_dim, 8 // width)
            tall = _rows(head_dim, width)
            _pack[(triton.cdiv(triton.cdiv(size, head_dim), tall), heads)](
                rows, slots, scales, middles, levels[at:], count, size, rows.stride(0), head_dim, head_bytes,
                _centre(grid), int(grid.top if grid.width < 8 else grid.largest), shift,
                WIDTH=width, GROUP=group, CHANNELWISE=grid.tokens > 0, E4M3=grid.e4m3,
                ROWS=tall, COLUMNS=triton.next_power_of_2(head_dim), num_warps=WARPS,
            )  # fmt: skip
            at += size

    def dequantise(self, rows: Tensor, slots: Tensor, grid: Grid, arrays: Arrays) -> None:
        """Writes ``rows`` at ``slots``, in their dtype. Scales must have been checked."""
        scales, middles, levels = arrays
        count, heads, head_dim = slots.shape[0], rows.shape[1], rows.shape[2]
        tall = _rows(head_dim)
        _unpack[(triton.cdiv(count, tall), heads)](
            rows, slots, scales, middles, levels, count, rows.stride(0), head_dim, levels.shape[0] // heads,
            _centre(grid), WIDTH=grid.width, GROUP=grid.group(head_dim), CHANNELWISE=grid.tokens > 0, E4M3=grid.e4m3,
            ROWS=tall, COLUMNS=triton.next_power_of_2(head_dim), num_warps=WARPS,
        )  # fmt: skip

    def gather(self, rows: Tensor, slots: Tensor, words: Tensor) -> None:
        """``words`` [kv_heads, count, head_dim], in the rows' dtype."""
        gather_words(rows, slots, words)

    def scatter(self, words: Tensor, rows: Tensor, slots: Tensor) -> None:
        scatter_words(words, rows, slots)

    def split(self, rows: Tensor, slots: Tensor, planes: list[Tensor]) -> None:
        """Words rotated left by one bit, their bytes dealt out to ``planes`` [kv_heads, count, head_dim] each."""
        split_words(rows, slots, planes)

    def join(self, planes: list[Tensor], rows: Tensor, slots: Tensor) -> None:
        join_words(planes, rows, slots)


def _centre(grid: Grid) -> float:
    return 0.0 if grid.width == 8 else grid.top / 2


def _rows(head_dim: int, width: int = 8) -> int:
    """Rows of ``head_dim`` bytes that make a program of 2,048 values."""
    return max(1, 256 * width // int(triton.next_power_of_2(head_dim)))


def _specialisation(name: str, fn: Any, dtype: str, constants: dict[str, object]) -> Specialisation:
    kinds = {
        "rows_ptr": f"*{dtype}", "slots_ptr": "*i64", "scales_ptr": "*i16", "middles_ptr": "*i16", "levels_ptr": "*u8",
        "largest": "fp32", "half_top": "fp32", "centre": "fp32",
    }  # fmt: skip
    signature = {argument: kinds.get(argument, "i32") for argument in fn.arg_names if argument not in constants}
    aligned = frozenset(signature) & {"rows_ptr", "slots_ptr", "row_stride", "head_dim", "group"}
    return Specialisation(
        f"{name}[{dtype}]", fn, signature | dict.fromkeys(constants, "constexpr"), constants, WARPS, 3, aligned
    )


def _forms() -> list[tuple[str, Any, dict[str, object]]]:
    """Names, kernels and constants of the ladder's grids, for heads of 128."""
    by_token: dict[str, object] = {"GROUP": 64, "CHANNELWISE": False, "E4M3": False, "COLUMNS": 128}
    by_channel = by_token | {"GROUP": 128, "CHANNELWISE": True}
    forms: list[tuple[str, Any, dict[str, object]]] = [
        ("token_scales", _token_scales, {"TOKENS": TOKENS_BLOCK, "GROUP_BLOCK": 64}),
        ("channel_scales, 128", _channel_scales, {"GROUP": 128, "CHANNELS": 64}),
        ("channel_scales, 32", _channel_scales, {"GROUP": 32, "CHANNELS": 64}),
    ]
    grids: dict[str, tuple[int, dict[str, object]]] = {
        "int8": (8, by_token), "fp8": (8, by_token | {"E4M3": True}),
        "int6 K": (6, by_channel), "int6 V": (6, by_token),
        "int4 K": (4, by_channel), "int4 V": (4, by_token),
        "int2 K": (2, by_channel | {"GROUP": 32}), "int2 V": (2, by_token),
    }  # fmt: skip
    for name, (width, grid) in grids.items():
        forms.append((f"unpack {name}", _unpack, {"WIDTH": width, "ROWS": _rows(128), **grid}))
        if width != 6:  # its four bits are packed as int4's, its two as below
            forms.append((f"pack {name}", _pack, {"WIDTH": width, "ROWS": _rows(128, width), **grid}))
    forms.append(("pack int6 K's two bits", _pack, {"WIDTH": 2, "ROWS": _rows(128, 2), **by_channel}))
    return forms


SPECIALISATIONS = tuple(
    _specialisation(name, fn, dtype, constants) for name, fn, constants in _forms() for dtype in ("bf16", "fp32")
)
