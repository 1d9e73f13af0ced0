"""Bit-exact: the bytes of equal rank form planes, and those that shrink go through zstd."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs.block import CodecError, Scratch, Shape, Words
from kvtransfer.codecs.entropy import Entropy
from kvtransfer.codecs.planes import Planes, choose_planes

_MAGIC = b"BKP2"
_HEAD = struct.Struct("<4sII")  # magic, tokens, which planes went through zstd: bit i is plane i
_SIZE = np.dtype("<u4")
_PROBE_BYTES = 4096
_PAYS = 0.97  # a plane whose sample shrinks less than this is stored


class LosslessCodec:
    """Values are rotated left by one bit, which puts the eight exponent bits into the top byte alone and the sign below
    the mantissa; the bytes of equal rank then form planes. The exponent plane has 2.5-3 bits of entropy and goes
    through zstd; a mantissa plane does only if a sample of it shrinks (float32 that was computed in bfloat16 has an
    empty one).

        header  magic, tokens, which planes went through zstd, and every plane's size
        planes  least significant first: those that are stored, then those that went through zstd
    """

    name = "lossless"

    def __init__(self, layout: KVLayout, planes: Planes | None = None) -> None:
        """``planes``: how words are taken apart and joined; None takes the fastest there is."""
        self._shape = Shape(layout)
        self._planes = planes or choose_planes(self._shape.word.itemsize)
        self.mantissas = [True] * (len(self._planes.dtypes) - 1) + [False]
        self._head_bytes = _HEAD.size + _SIZE.itemsize * len(self._planes.dtypes)
        self._entropy, self._scratch = Entropy(), Scratch()

    def bound(self, count: int) -> int:
        return self._head_bytes + self._shape.values(count) * self._shape.word.itemsize

    def encode(self, keys: Tensor, values: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        shape, count = self._shape, keys.shape[0]
        both = [shape.words(shape.checked(tensor, count)) for tensor in (keys, values)]
        half = shape.values(count) // 2

        def split(planes: Sequence[Words]) -> None:
            for words, at in zip(both, (0, half), strict=True):
                self._planes.split(words, [plane[at : at + half] for plane in planes])

        return self.encode_planes(count, self._stored_planes(both[0]), split, into)

    def encode_planes(
        self, count: int, stored: Sequence[bool], split: Callable[[Sequence[Words]], None], into: memoryview
    ) -> int:
        """A block of ``count`` tokens whose planes ``split`` fills; which of them are ``stored`` as they are."""
        total, dtypes = self._shape.values(count), self._planes.dtypes
        sizes = np.frombuffer(into, _SIZE, len(dtypes), _HEAD.size)
        planes, end = [], self._head_bytes
        for index, dtype in enumerate(dtypes):
            if stored[index]:
                planes.append(np.frombuffer(into, dtype, total, end))
                sizes[index] = total * dtype.itemsize
                end += int(sizes[index])
            else:
                planes.append(self._scratch.room(f"plane{index}", total, dtype))
        split(planes)
        packed = 0
        for index, plane in enumerate(planes):
            if not stored[index]:
                packed |= 1 << index
                sizes[index] = self._entropy.pack(plane, into[end:])
                end += int(sizes[index])
        _HEAD.pack_into(into, 0, _MAGIC, count, packed)
        return end

    def _stored_planes(self, words: Words) -> list[bool]:
        """Which planes to store uncompressed: every mantissa plane whose sample does not shrink."""
        sample = words[: max(1, _PROBE_BYTES // self._shape.head_dim), :1]
        planes = [np.empty(sample.size, dtype) for dtype in self._planes.dtypes]
        self._planes.split(np.ascontiguousarray(sample), planes)
        return [*(self._entropy.size(plane) >= _PAYS * plane.nbytes for plane in planes[:-1]), False]

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        total = self._shape.values(count)
        planes = self.decode_planes(data, count)
        out = self._scratch.room("decoded", total, self._shape.word)
        self._planes.join(planes, out)
        return self._shape.tensors(out, count)

    def decode_planes(self, data: memoryview, count: int) -> list[Words]:
        """A block's planes. Raises :class:`CodecError`."""
        total = self._shape.values(count)
        return [
            np.frombuffer(self._entropy.unpack(body, total * dtype.itemsize), dtype)
            for body, dtype in zip(self._bodies(data, count), self._planes.dtypes, strict=True)
        ]

    def _bodies(self, data: memoryview, count: int) -> list[memoryview]:
        """Every plane's bytes, which together must be all of ``data`` after the header."""
        if len(data) < self._head_bytes:
            raise CodecError(f"lossless block of {len(data)} bytes has no header")
        magic, tokens, packed = _HEAD.unpack_from(data)
        planes = len(self._planes.dtypes)
        if magic != _MAGIC or tokens != count or packed >> planes:
            raise CodecError(f"lossless block starts with {magic!r} for {tokens} tokens, expected {count}")
        sizes = np.frombuffer(data, _SIZE, planes, _HEAD.size).tolist()
        bodies, end = [memoryview(b"")] * planes, self._head_bytes
        for index in sorted(range(planes), key=lambda index: packed >> index & 1):
            whole = self._shape.values(count) * self._planes.dtypes[index].itemsize
            if not 0 < sizes[index] <= whole or (sizes[index] < whole and not packed >> index & 1):
                raise CodecError(f"lossless block: plane {index} takes {sizes[index]} of {whole} bytes")
            bodies[index] = data[end : end + sizes[index]]
            end += sizes[index]
        if end != len(data):
            raise CodecError(f"lossless block: planes end at {end} of {len(data)} bytes")
        return bodies
