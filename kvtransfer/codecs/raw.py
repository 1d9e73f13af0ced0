"""The values' bits in canonical order; one copy to encode, none to decode."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs.block import CodecError, Shape


class RawCodec:
    name = "raw"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = Shape(layout)

    def bound(self, count: int) -> int:
        return self._shape.values(count) * self._shape.word.itemsize

    def encode(self, keys: Tensor, values: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        shape, count = self._shape, keys.shape[0]
        nbytes = self.bound(count)
        out = np.frombuffer(into, shape.word, shape.values(count)).reshape(2, shape.heads, count, shape.head_dim)
        out[0] = shape.words(shape.checked(keys, count)).transpose(1, 0, 2)
        out[1] = shape.words(shape.checked(values, count)).transpose(1, 0, 2)
        return nbytes

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        if len(data) != self.bound(count):
            raise CodecError(f"raw block of {len(data)} bytes, expected {self.bound(count)}")
        return self._shape.tensors(np.frombuffer(data, self._shape.word), count)
