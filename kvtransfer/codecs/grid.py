"""How K or V is quantised, and how many bytes that takes. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

VALUES_GROUP = 64  # values of one token and head that share a scale, at most
TOKENS_GROUP = 128  # tokens of one channel that share a scale and a middle, at most
FURTHEST = 127  # steps from a channel's middle, where all channels of a head share a step


@dataclass(frozen=True, slots=True)
class Grid:
    """Levels 0..``top`` at even steps, or e4m3's own 0..448.

    Per channel, a group is ``tokens`` tokens of one channel: ``value = middle + scale * (level - top / 2)``. Per token
    (``tokens`` 0), it is at most 64 values of one token and head, and the middle is zero. Scales and middles are
    bfloat16, scales rounded up and middles towards zero, so that no value lies outside the levels and the error is at
    most half a scale. Eight-bit levels are stored as signed bytes, ``level - top / 2``.
    """

    width: int  # bits of a stored level: 8, 6, 4 or 2
    top: int
    tokens: int = 0
    e4m3: bool = False

    @property
    def largest(self) -> float:
        """The largest level as the loops want it: 448 for e4m3, above the middle per token, from 0 per channel."""
        return 448.0 if self.e4m3 else float(self.top) if self.tokens else self.top / 2

    def group(self, head_dim: int) -> int:
        """Tokens, or values, of one group."""
        if self.tokens:
            return self.tokens
        return next(size for size in range(min(VALUES_GROUP, head_dim), 0, -1) if head_dim % size == 0)

    def groups(self, count: int, heads: int, head_dim: int) -> int:
        """Scales of ``count`` tokens."""
        if self.tokens:
            return heads * -(-count // self.tokens) * head_dim
        return heads * count * (head_dim // self.group(head_dim))

    def middles(self, count: int, heads: int, head_dim: int) -> int:
        return self.groups(count, heads, head_dim) if self.tokens else 0

    def level_bytes(self, count: int, heads: int, head_dim: int) -> int:
        return heads * packed_bytes(count * head_dim, self.width)


def packed_bytes(levels: int, width: int) -> int:
    """Bytes of one head's levels."""
    if width == 6:
        return packed_bytes(levels, 4) + packed_bytes(levels, 2)
    per_byte = 8 // width
    return -(-levels // per_byte)
