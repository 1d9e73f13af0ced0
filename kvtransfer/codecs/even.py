"""The lossy codecs that are made for entropy coding: K in steps that all channels of a head share.

The error of an attention score is the sum of K's errors, weighed by the query, so that a bit spent on a wide channel
should buy as much as one spent on a narrow one: equal steps, and levels as far from the middle as a channel needs.
Channels then differ in entropy, so those of like spread are compressed together: each such class has its own table
(CacheGen's models per channel group, arXiv:2310.07240, found in the block itself; ADR 8).

    header    tokens kept exactly at the block's start and at its end, u16 each
    exact     those tokens' values in the layout's dtype, canonical
    K steps [heads], K middles [heads, head_dim], V scales    bfloat16
    K classes [heads, head_dim]    u8: which class holds a channel's levels
    table     per class: size u32, and its largest level u8, which decides how its levels are packed
    K levels  class after class: its channels in order, each [count]
    V levels  packed per head, to the block's end; all parts from here on compressed unless that does not help
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs.block import CodecError, Scratch, Shape, Words
from kvtransfer.codecs.ends import Ends
from kvtransfer.codecs.entropy import Entropy
from kvtransfer.codecs.grid import FURTHEST, Grid, packed_bytes
from kvtransfer.codecs.quantiser import Quantiser, choose_quantiser

CLASSES = 8
# Class c holds channels whose levels lie 0.35 * 2^(c-1) to 0.35 * 2^c steps from their middle on average. Octaves cost
# 0.3 % more than half octaves.
_SPREADS = np.array([7 << power for power in range(CLASSES - 1)])  # in twentieths of a step
_TABLE = struct.Struct("<" + "IB" * CLASSES)
_HALF, _BYTE, _SIGNED = np.dtype("<u2"), np.dtype("u1"), np.dtype("i1")


@dataclass(frozen=True, slots=True)
class Even:
    """One rung. ``resolution``: steps in the typical half range of a head's channels; ``values``: V's grid."""

    resolution: float
    values: Grid
    sinks: int = 1


EVEN = {
    "int6-zstd": Even(36.0, Grid(8, 40)),
    "int4-zstd": Even(12.0, Grid(4, 14)),
    "int3-zstd": Even(7.0, Grid(4, 8)),
    "int2-zstd": Even(3.0, Grid(4, 5)),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """A block's arrays of fixed size, over its bytes, and where they end."""

    steps: Words
    middles: Words
    scales: Words
    classes: Words
    end: int


class EvenCodec:
    def __init__(self, name: str, level: Even, layout: KVLayout, quantiser: Quantiser | None = None) -> None:
        """``quantiser``: None takes the fastest there is."""
        self.name = name
        self._level = level
        self._shape = Shape(layout)
        self._ends = Ends(self._shape, level.sinks, 0)
        self._quantiser = quantiser or choose_quantiser()
        self._entropy, self._scratch = Entropy(), Scratch()
        self._channels = layout.kv_heads * layout.head_dim
        self._head_bytes = self._ends.head_bytes

    def bound(self, count: int) -> int:
        exact = self._head_bytes + self._ends.most(count) * self._ends.token_bytes
        return exact + self._fixed_bytes(count) + self._channels * count + self._value_bytes(count)

    def encode(self, keys: Tensor, values: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        count = keys.shape[0]
        both = [self._shape.checked(tensor, count) for tensor in (keys, values)]
        kept = self._ends.of(count, before, after)
        end = self._ends.put(both, kept, into, self._head_bytes)
        if not (middle := count - kept.tokens):
            return end
        parts = self._parts(into, middle, end)
        levels = self._scratch.room("levels", self._channels * middle, _SIGNED)
        self._quantiser.quantise_even(both[0][kept.first :], self._level.resolution, parts.steps, parts.middles, levels)
        end = self._put_classes(levels.reshape(self._channels, middle), parts, into)
        room = self._scratch.room("values", self._value_bytes(middle), _BYTE)
        self._quantiser.quantise(both[1][kept.first :], self._level.values, parts.scales, parts.scales[:0], room)
        return end + self._entropy.pack(room, into[end:])

    def _put_classes(self, levels: Words, parts: Parts, into: memoryview) -> int:
        """levels: [channels, count]. Writes classes, table and compressed levels; returns where they end."""
        spread = 20 * np.abs(levels).sum(axis=1, dtype=np.int64)
        parts.classes[:] = (spread[:, None] >= _SPREADS * levels.shape[1]).sum(axis=1)
        table, end = [], parts.end
        for index in range(CLASSES):
            chosen = levels[parts.classes == index]
            size = top = 0
            if chosen.size:
                top = int(np.abs(chosen).max())
                width, offset = _packing(top)
                packed = self._scratch.room("packed", packed_bytes(chosen.size, width), _BYTE)
                self._quantiser.pack((chosen.reshape(-1) + offset).view(_BYTE), width, packed)
                size = self._entropy.pack(packed, into[end:])
            table += [size, top]
            end += size
        _TABLE.pack_into(into, parts.end - _TABLE.size, *table)
        return end

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        kept = self._ends.read(data, count)
        middle = count - kept.tokens
        start = self._head_bytes + kept.tokens * self._ends.token_bytes
        least, most = start, start
        if middle:
            least = start + self._fixed_bytes(middle) + 1
            most = least + self._channels * middle + self._value_bytes(middle)
        if not least <= len(data) <= most:
            raise CodecError(f"{self.name} block of {len(data)} bytes, expected {least} to {most}")
        words = self._scratch.room("decoded", self._shape.values(count), self._shape.word)
        out = self._shape.canonical(words, count)
        self._ends.take(data, kept, self._head_bytes, out)
        if middle:
            self._decode_middle(data, middle, start, out[:, :, kept.first :])
        return out[0].transpose(0, 1), out[1].transpose(0, 1)

    def _decode_middle(self, data: memoryview, count: int, start: int, out: Tensor) -> None:
        parts = self._parts(data, count, start)
        levels, end = self._take_classes(data, count, parts)
        self._quantiser.dequantise_even(parts.steps, parts.middles, levels, out[0])
        body = self._entropy.unpack(data[end:], self._value_bytes(count))
        self._quantiser.dequantise(
            self._level.values, parts.scales, parts.scales[:0], np.frombuffer(body, _BYTE), out[1]
        )

    def _take_classes(self, data: memoryview, count: int, parts: Parts) -> tuple[Words, int]:
        """K's levels [channels * count], and where their bytes end. Raises :class:`CodecError`."""
        table, end = _TABLE.unpack_from(data, parts.end - _TABLE.size), parts.end
        if parts.classes.max() >= CLASSES:
            raise CodecError(f"{self.name} block names a class that does not exist")
        levels = self._scratch.room("levels", self._channels * count, _SIGNED)
        for index in range(CLASSES):
            size, top = table[2 * index : 2 * index + 2]
            chosen = np.flatnonzero(parts.classes == index)
            if (size > 0) != (chosen.size > 0) or end + size >= len(data) or top > FURTHEST:
                raise CodecError(f"{self.name} block: class {index} has {size} bytes for {chosen.size} channels")
            if size:
                width, offset = _packing(top)
                packed = self._entropy.unpack(data[end : end + size], packed_bytes(chosen.size * count, width))
                plain = self._scratch.room("plain", chosen.size * count, _BYTE)
                self._quantiser.unpack(np.frombuffer(packed, _BYTE), width, plain)
                levels.reshape(self._channels, count)[chosen] = (plain.view(_SIGNED) - offset).reshape(-1, count)
            end += size
        return levels, end

    def _parts(self, data: memoryview, count: int, start: int) -> Parts:
        """Views of a block's fixed arrays, from ``start`` on."""
        heads, scales = self._shape.heads, self._level.values.groups(count, self._shape.heads, self._shape.head_dim)
        halves = np.frombuffer(data, _HALF, heads + self._channels + scales, start)
        steps, middles, rest = np.split(halves, [heads, heads + self._channels])
        end = start + halves.nbytes
        classes = np.frombuffer(data, _BYTE, self._channels, end)
        return Parts(steps, middles, rest, classes, end + self._channels + _TABLE.size)

    def _fixed_bytes(self, count: int) -> int:
        if not count:
            return 0
        heads, head_dim = self._shape.heads, self._shape.head_dim
        halves = heads + self._channels + self._level.values.groups(count, heads, head_dim)
        return halves * _HALF.itemsize + self._channels + _TABLE.size

    def _value_bytes(self, count: int) -> int:
        return self._level.values.level_bytes(count, self._shape.heads, self._shape.head_dim)


def _packing(top: int) -> tuple[int, np.int8]:
    """Bits of a stored level, and what is added to it, for levels of -top..top."""
    if top <= 1:
        return 2, np.int8(1)
    return (4, np.int8(7)) if top <= 7 else (8, np.int8(0))
