"""Lossy codecs whose blocks have one size: one format for every level that needs no entropy coding.

    header   tokens kept exactly at the block's start and at its end, u16 each; only in levels that keep any
    exact    those tokens' values in the layout's dtype, canonical: of the start, then of the end
    K scales, K middles, V scales    bfloat16; middles only where the grid is per channel
    K levels, V levels               packed per head; compressed together where the codec says so

Scales need no lengths: the token count and the header decide all sizes but that of compressed levels, which end the
block. KV that is not finite, or of 2^127 and more, is refused by every quantised part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs.block import CodecError, Scratch, Shape, Words
from kvtransfer.codecs.ends import Ends
from kvtransfer.codecs.entropy import Entropy
from kvtransfer.codecs.grid import TOKENS_GROUP, Grid
from kvtransfer.codecs.quantiser import Quantiser, choose_quantiser

_SCALE = np.dtype("<u2")
_BYTE = np.dtype("u1")
KIVI_GROUP = 32  # of tokens, in KIVI (arXiv:2402.02750)
KIVI_WINDOW = 128  # its residual window: the prompt's latest tokens, which attention weighs most


@dataclass(frozen=True, slots=True)
class Level:
    """One rung. ``sinks`` and ``window``: the prompt's first and last tokens, kept exactly."""

    keys: Grid
    values: Grid
    sinks: int = 0
    window: int = 0


# The first token of a prompt draws attention whatever it says, and its K lies far outside the other tokens' range: in a
# group per channel it would widen every step. One token kept exactly halves int4's divergence (ADR 8).
LADDER: dict[str, Level] = {
    "fp8": Level(Grid(8, 0, e4m3=True), Grid(8, 0, e4m3=True)),
    "int8": Level(Grid(8, 254), Grid(8, 254)),
    "int6": Level(Grid(6, 62, TOKENS_GROUP), Grid(6, 62), sinks=1),
    "int4": Level(Grid(4, 14, TOKENS_GROUP), Grid(4, 14), sinks=1),
    "int2": Level(Grid(2, 3, KIVI_GROUP), Grid(2, 3), sinks=1, window=KIVI_WINDOW),
}


class QuantisedCodec:
    def __init__(
        self, name: str, level: Level, layout: KVLayout, *, compress: bool, quantiser: Quantiser | None = None
    ):
        """``compress``: whether levels are entropy coded. ``quantiser``: None takes the fastest there is."""
        self.name = name
        self.level = level
        self._shape = Shape(layout)
        self.ends = Ends(self._shape, level.sinks, level.window)
        self._quantiser = quantiser or choose_quantiser()
        self._entropy = Entropy() if compress else None
        self._scratch = Scratch()

    def bound(self, count: int) -> int:
        exact = self.ends.head_bytes + self.ends.most(count) * self.ends.token_bytes
        return exact + self.scale_bytes(count) + sum(self.level_bytes(count))

    def encode(self, keys: Tensor, values: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        count = keys.shape[0]
        both = [self._shape.checked(tensor, count) for tensor in (keys, values)]
        kept = self.ends.of(count, before, after)
        end = self.ends.put(both, kept, into, self.ends.head_bytes)
        middle = count - kept.tokens
        if not middle:
            return end
        scales, end = self.scales(into, middle, end)
        sizes = self.level_bytes(middle)
        levels = (
            np.frombuffer(into, _BYTE, sum(sizes), end)
            if self._entropy is None
            else self._scratch.room("levels", sum(sizes), _BYTE)
        )
        for tensor, grid, (scale, centre), part in zip(
            both, (self.level.keys, self.level.values), scales, np.split(levels, [sizes[0]]), strict=True
        ):
            self._quantiser.quantise(tensor[kept.first : count - kept.last], grid, scale, centre, part)
        return end + (sum(sizes) if self._entropy is None else self._entropy.pack(levels, into[end:]))

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        kept = self.ends.read(data, count)
        middle = count - kept.tokens
        self.check_size(len(data), kept.tokens, middle)
        words = self._scratch.room("decoded", self._shape.values(count), self._shape.word)
        out = self._shape.canonical(words, count)
        end = self.ends.take(data, kept, self.ends.head_bytes, out)
        if middle:
            self._decode_levels(data, middle, end, out[:, :, kept.first : count - kept.last])
        return out[0].transpose(0, 1), out[1].transpose(0, 1)

    def check_size(self, nbytes: int, exact: int, middle: int) -> None:
        """Raises :class:`CodecError` for bytes that are too few for what has a fixed size, or more than any block."""
        fixed = self.ends.head_bytes + exact * self.ends.token_bytes + self.scale_bytes(middle)
        most = sum(self.level_bytes(middle))
        least = most if self._entropy is None else min(1, most)
        if not least <= nbytes - fixed <= most:
            raise CodecError(f"{self.name} block of {nbytes} bytes, expected {fixed + least} to {fixed + most}")

    def _decode_levels(self, data: memoryview, count: int, start: int, out: Tensor) -> None:
        """``out``: [2, heads, count, head_dim], maybe a part of every head's tokens."""
        scales, end = self.scales(data, count, start)
        sizes = self.level_bytes(count)
        body = data[end:] if self._entropy is None else self._entropy.unpack(data[end:], sum(sizes))
        parts = np.split(np.frombuffer(body, _BYTE), [sizes[0]])
        grids = (self.level.keys, self.level.values)
        for tensor, grid, (scale, centre), part in zip(out, grids, scales, parts, strict=True):
            self._quantiser.dequantise(grid, scale, centre, part, tensor)

    def scales(self, data: memoryview, count: int, start: int) -> tuple[list[tuple[Words, Words]], int]:
        """Views of K's and V's scales and middles, and where they end."""
        parts, end = [], start
        for grid in (self.level.keys, self.level.values):
            pair = []
            for size in (grid.groups(*self._size(count)), grid.middles(*self._size(count))):
                pair.append(np.frombuffer(data, _SCALE, size, end) if size else np.empty(0, _SCALE))
                end += size * _SCALE.itemsize
            parts.append((pair[0], pair[1]))
        return parts, end

    def scale_bytes(self, count: int) -> int:
        size = self._size(count)
        grids = (self.level.keys, self.level.values)
        return sum(grid.groups(*size) + grid.middles(*size) for grid in grids) * _SCALE.itemsize

    def level_bytes(self, count: int) -> tuple[int, int]:
        size = self._size(count)
        return self.level.keys.level_bytes(*size), self.level.values.level_bytes(*size)

    def _size(self, count: int) -> tuple[int, int, int]:
        return count, self._shape.heads, self._shape.head_dim
