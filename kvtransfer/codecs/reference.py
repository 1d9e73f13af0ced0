"""Quantising in plain torch: what the compiled loops of codecs.cpp must equal bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvtransfer.codecs.block import REFUSAL, UNREADABLE, CodecError, Words
from kvtransfer.codecs.grid import FURTHEST, Grid, packed_bytes

REFUSED = 2.0**127  # its scale, rounded up, would decode to infinity
OCTAVES = 20 << 23  # see codecs.cpp


class TorchQuantiser:
    """See :class:`kvtransfer.codecs.quantiser.Quantiser`."""

    def quantise(self, x: Tensor, grid: Grid, scales: Words, middles: Words, levels: Words) -> None:
        wide = x.float().transpose(0, 1)  # [heads, count, head_dim]
        if not bool((wide.abs() < REFUSED).all()):
            raise CodecError(REFUSAL)
        found = _by_channel(wide, grid, middles) if grid.tokens else _by_token(wide, grid)
        step, tile_levels = found  # levels: [heads, count * head_dim] uint8
        scales[:] = _high(step)
        size = levels.size // x.shape[1]
        for head in range(x.shape[1]):
            levels[head * size : (head + 1) * size] = pack(tile_levels[head], grid.width).numpy()

    def dequantise(self, grid: Grid, scales: Words, middles: Words, levels: Words, out: Tensor) -> None:
        heads, count, head_dim = out.shape
        step, middle = _wide(scales), _wide(middles)
        finite = bool(step.isfinite().all()) and bool(middle.isfinite().all())
        if not finite or bool(step.signbit().any()):
            raise CodecError(UNREADABLE)
        tiles = [
            unpack(torch.from_numpy(part.copy()), count * head_dim, grid.width) for part in levels.reshape(heads, -1)
        ]
        stored = torch.stack(tiles).view(heads, count, head_dim)
        if grid.tokens:
            out.copy_(_of_channels(stored, step, middle, grid))
        else:
            values = _of_tokens(stored, grid).view(heads, count, -1, grid.group(head_dim))
            out.copy_((values * step.view(heads, count, -1, 1)).view(out.shape))
        _check_finite(out)

    def quantise_even(self, x: Tensor, resolution: float, steps: Words, middles: Words, levels: Words) -> None:
        wide = x.float().permute(1, 2, 0)  # [heads, head_dim, count]
        if not bool((wide.abs() < REFUSED).all()):
            raise CodecError(REFUSAL)
        low, high = wide.amin(dim=2), wide.amax(dim=2)
        middle = _middle(low, high)
        half = torch.maximum(high - middle, middle - low).view(torch.int32).long()
        widest = half.amax(dim=1, keepdim=True)
        typical = half.maximum(widest - OCTAVES).sum(dim=1, keepdim=True).clamp(min=0) // x.shape[2]
        step = torch.maximum(_up(_real(typical) / resolution), _up(_real(widest) / FURTHEST))
        scaled = (wide - middle[..., None]) / torch.where(step > 0, step, 1.0)[..., None]
        steps[:], middles[:] = _high(step.flatten()), _high(middle.flatten())
        levels[:] = scaled.round().clamp(-FURTHEST, FURTHEST).to(torch.int8).flatten().numpy()

    def dequantise_even(self, steps: Words, middles: Words, levels: Words, out: Tensor) -> None:
        heads, count, head_dim = out.shape
        step, middle = _wide(steps), _wide(middles)
        if not bool(step.isfinite().all() and middle.isfinite().all()) or bool(step.signbit().any()):
            raise CodecError(UNREADABLE)
        stored = torch.from_numpy(levels).view(heads, head_dim, count).float()
        wide = stored * step.view(heads, 1, 1) + middle.view(heads, head_dim, 1)
        _check_finite(out.copy_(wide.transpose(1, 2)))

    def pack(self, levels: Words, width: int, into: Words) -> None:
        into[:] = pack(torch.from_numpy(levels), width).numpy()

    def unpack(self, packed: Words, width: int, levels: Words) -> None:
        levels[:] = unpack(torch.from_numpy(packed.copy()), levels.size, width).numpy()


def _check_finite(out: Tensor) -> None:
    if not bool(out.isfinite().all()):
        raise CodecError(UNREADABLE)


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """To bfloat16, towards zero; + 0: which zero is low is chance."""
    return (high * 0.5 + low * 0.5 + 0.0).view(torch.int32).bitwise_and(-0x10000).view(torch.float32)


def _real(bits: Tensor) -> Tensor:
    """float32 of bits kept in int64."""
    return bits.int().view(torch.float32)


def _by_token(wide: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    heads, count, head_dim = wide.shape
    grouped = wide.reshape(heads, count, -1, grid.group(head_dim))
    step = _up(grouped.abs().amax(dim=-1, keepdim=True) / grid.largest)
    scaled = grouped / torch.where(step > 0, step, 1.0)
    if grid.e4m3:
        stored = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        signed = scaled.round().clamp(-grid.largest, grid.largest)
        level = (scaled + grid.largest).round().clamp(0, grid.top)
        stored = signed.to(torch.int8).view(torch.uint8) if grid.width == 8 else level.to(torch.uint8)
    return step.flatten(), stored.reshape(heads, -1)


def _by_channel(wide: Tensor, grid: Grid, middles: Words) -> tuple[Tensor, Tensor]:
    steps, centres, levels = [], [], []
    for first in range(0, wide.shape[1], grid.tokens):
        part = wide[:, first : first + grid.tokens]
        low, high = part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True)
        middle = _middle(low, high)
        step = _up(torch.maximum(high - middle, middle - low) / (grid.top / 2))
        scaled = (part - middle) / torch.where(step > 0, step, 1.0) + grid.top / 2
        levels.append(scaled.round().clamp(0, grid.top).to(torch.uint8))
        steps.append(step)
        centres.append(middle)
    middles[:] = _high(torch.cat(centres, dim=1).flatten())
    return torch.cat(steps, dim=1).flatten(), torch.cat(levels, dim=1).flatten(1)


def _of_tokens(stored: Tensor, grid: Grid) -> Tensor:
    if grid.e4m3:
        if bool(((stored & 0x7F) == 0x7F).any()):
            raise CodecError(UNREADABLE)
        return stored.view(torch.float8_e4m3fn).float()
    return stored.view(torch.int8).float() if grid.width == 8 else stored.float() - grid.largest


def _of_channels(stored: Tensor, step: Tensor, middle: Tensor, grid: Grid) -> Tensor:
    heads, count, head_dim = stored.shape
    group = torch.arange(count) // grid.tokens
    by_group = (heads, -1, head_dim)
    return (stored.float() - grid.top / 2) * step.view(by_group)[:, group] + middle.view(by_group)[:, group]


def pack(levels: Tensor, width: int) -> Tensor:
    """[n] levels to [packed_bytes(n, width)]: level i lies beside level i + n/2 (four bits), n/4 apart (two)."""
    if width == 8:
        return levels
    if width == 6:
        return torch.cat((pack(levels >> 2, 4), pack(levels & 3, 2)))
    size = packed_bytes(levels.shape[0], width)
    parts = torch.zeros(8 // width * size, dtype=torch.uint8)
    parts[: levels.shape[0]] = levels
    packed = torch.zeros(size, dtype=torch.uint8)
    for index, part in enumerate(parts.view(-1, size)):
        packed |= part << (index * width)
    return packed


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse: [count] levels."""
    if width == 8:
        return packed
    if width == 6:
        split = packed_bytes(count, 4)
        return unpack(packed[:split], count, 4) << 2 | unpack(packed[split:], count, 2)
    mask = (1 << width) - 1
    return torch.cat([packed >> shift & mask for shift in range(0, 8, width)])[:count]


def _up(step: Tensor) -> Tensor:
    """To bfloat16, away from zero."""
    return (((step.view(torch.int32) & 0x7FFFFFFF) + 0xFFFF) & -0x10000).view(torch.float32)


def _high(values: Tensor) -> Words:
    """The bits of bfloat16 values kept in float32."""
    words: Words = (values.view(torch.int32).numpy().view(np.uint32) >> 16).astype("<u2")
    return words


def _wide(words: Words) -> Tensor:
    return torch.from_numpy((words.astype(np.uint32) << 16).view(np.float32))
