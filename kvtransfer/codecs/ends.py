"""The prompt's ends, which lossy codecs may keep exactly: how many tokens of a block, and their bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvtransfer.codecs.block import CodecError, Shape, Words

HEAD = struct.Struct("<HH")  # tokens kept at the block's start, and at its end


@dataclass(frozen=True, slots=True)
class Kept:
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.first + self.last


class Ends:
    """``sinks`` and ``window``: the prompt's first and last tokens, in the layout's dtype and canonical order."""

    def __init__(self, shape: Shape, sinks: int, window: int) -> None:
        self._shape, self._sinks, self._window = shape, sinks, window
        self.any = sinks + window > 0
        self.head_bytes = HEAD.size if self.any else 0
        self.token_bytes = shape.values(1) * shape.word.itemsize

    def most(self, count: int) -> int:
        """Tokens of a block of ``count`` that are kept, at most."""
        return min(count, self._sinks + self._window)

    def of(self, count: int, before: int, after: int) -> Kept:
        first = min(count, max(0, self._sinks - before))
        return Kept(first, min(count - first, max(0, self._window - after)))

    def read(self, data: memoryview, count: int) -> Kept:
        """What a block's header says. Raises :class:`CodecError` for what no encoder writes."""
        if not self.any:
            return Kept(0, 0)
        if len(data) < HEAD.size:
            raise CodecError(f"a block of {len(data)} bytes has no header")
        kept = Kept(*HEAD.unpack_from(data))
        if kept.first > self._sinks or kept.last > self._window or kept.tokens > count:
            raise CodecError(f"a block keeps {kept.first} and {kept.last} of {count} tokens")
        return kept

    def put(self, both: list[Tensor], kept: Kept, into: memoryview, end: int) -> int:
        """Writes the kept tokens' values from ``end`` on, and the header; returns where they end."""
        if self.any:
            HEAD.pack_into(into, 0, kept.first, kept.last)
        count = both[0].shape[0]
        for at, some in ((0, kept.first), (count - kept.last, kept.last)):
            if some:
                room = self._words(into, some, end)
                for tensor, part in zip(both, room.reshape(2, self._shape.heads, some, -1), strict=True):
                    words = self._shape.words(tensor[at : at + some])
                    part[:] = words.transpose(1, 0, 2)
                end += some * self.token_bytes
        return end

    def take(self, data: memoryview, kept: Kept, end: int, out: Tensor) -> int:
        """Fills the ends of ``out`` [2, heads, count, head_dim] from ``data``; returns where their bytes end."""
        count = out.shape[2]
        for at, some in ((0, kept.first), (count - kept.last, kept.last)):
            if some:
                out[:, :, at : at + some] = self._shape.canonical(self._words(data, some, end), some)
                end += some * self.token_bytes
        return end

    def _words(self, data: memoryview, some: int, at: int) -> Words:
        return np.frombuffer(data, self._shape.word, self._shape.values(some), at)
