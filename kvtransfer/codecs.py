"""KV blocks as bytes and back: raw, lossless (byte planes and zstd) and int8.

The wire layout is canonical and knows no pages: K then V, per KV head, token after token, ``head_dim`` values,
little-endian. A codec object belongs to one thread: it keeps its compressor and scratch memory.

Sizes found in the bytes are checked against what the block's token count allows before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from baton.errors import BatonError
from baton.layout import DTYPE_BYTES, KVLayout
from kvtransfer.arena import ALIGN
from kvtransfer.protocol import block_tokens

Words: TypeAlias = npt.NDArray[Any]  # unsigned integers that carry the values' bits


class CodecError(BatonError):
    """A block cannot be encoded by this codec, or its bytes are not what the codec writes."""


class Codec(Protocol):
    name: str

    def bound(self, count: int) -> int:
        """Most bytes that ``count`` tokens of one layer can take."""

    def encode(self, keys: Tensor, values: Tensor, into: memoryview) -> int:
        """Writes the block at the start of ``into`` (``bound`` bytes) and returns its size.

        keys, values: [count, kv_heads, head_dim]. Raises :class:`CodecError`.
        """

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [count, kv_heads, head_dim] each, maybe strided. Raises :class:`CodecError`.

        They share memory with ``data`` or with the codec and stay valid until the next call.
        """


def make_codec(name: str, layout: KVLayout) -> Codec:
    """The codec called ``name``; raises ValueError for a name that is none."""
    match name:
        case "raw":
            return RawCodec(layout)
        case "lossless":
            return LosslessCodec(layout)
        case "int8":
            return Int8Codec(layout)
        case _:
            raise ValueError(f"codec {name!r}")


def largest_block(codecs: Iterable[Codec], layout: KVLayout) -> int:
    """Bytes of the largest block that any of ``codecs`` may produce."""
    return max(codec.bound(block_tokens(layout)) for codec in codecs) + ALIGN


class _Shape:
    """What every codec needs to know about a layout."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.heads, self.head_dim = layout.kv_heads, layout.head_dim
        self.word = np.dtype(f"<u{DTYPE_BYTES[layout.dtype]}")
        self._torch_word = torch.int32 if layout.dtype == "float32" else torch.int16
        self._torch_dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16

    def values(self, count: int) -> int:
        return 2 * self.heads * count * self.head_dim

    def words(self, tensor: Tensor, count: int) -> Words:
        """The bits of one of K, V: [count, heads, head_dim], not copied when it is in host memory."""
        if tensor.shape != (count, self.heads, self.head_dim) or tensor.dtype != self._torch_dtype:
            raise CodecError(f"block of {tuple(tensor.shape)} {tensor.dtype}, expected {self.layout}")
        words: Words = tensor.detach().cpu().view(self._torch_word).numpy().view(self.word)
        return words

    def tensors(self, canonical: Words, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values over ``canonical`` words [2 * heads * count * head_dim]."""
        signed = canonical.view(canonical.dtype.str.replace("u", "i"))
        both = torch.from_numpy(signed).view(self._torch_dtype).view(2, self.heads, count, self.head_dim)
        return both[0].transpose(0, 1), both[1].transpose(0, 1)


class RawCodec:
    """The values' bits in canonical order; one copy to encode, none to decode."""

    name = "raw"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = _Shape(layout)

    def bound(self, count: int) -> int:
        return self._shape.values(count) * self._shape.word.itemsize

    def encode(self, keys: Tensor, values: Tensor, into: memoryview) -> int:
        shape, count = self._shape, keys.shape[0]
        nbytes = self.bound(count)
        out = np.frombuffer(into, shape.word, shape.values(count)).reshape(2, shape.heads, count, shape.head_dim)
        out[0] = shape.words(keys, count).transpose(1, 0, 2)
        out[1] = shape.words(values, count).transpose(1, 0, 2)
        return nbytes

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        if len(data) != self.bound(count):
            raise CodecError(f"raw block of {len(data)} bytes, expected {self.bound(count)}")
        return self._shape.tensors(np.frombuffer(data, self._shape.word), count)


_MAGIC = b"BKP1"
_HEAD = struct.Struct("<4sI")  # magic, tokens
_PLANE = struct.Struct("<II")  # offset, size
_PROBE_BYTES = 4096
_PAYS = 0.97  # a plane whose sample shrinks less than this is stored


class LosslessCodec:
    """Bit-exact. Values are rotated left by one bit, which puts the eight exponent bits into the top byte alone and
    the sign below the mantissa; the bytes of equal rank then form planes. The exponent plane has 2.5-3 bits of entropy
    and goes through zstd level 1; a mantissa plane does only if a sample of it shrinks (float32 that was computed in
    bfloat16 has an empty one).

        header  magic, tokens, then per plane: offset, size (equal to the plane's own size when it is stored)
    """

    name = "lossless"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = _Shape(layout)
        # (right shift, plane type), least significant first.
        self._planes: tuple[tuple[int, np.dtype[Any]], ...] = (
            ((0, np.dtype("<u2")), (16, np.dtype("u1")), (24, np.dtype("u1")))
            if layout.dtype == "float32"
            else ((0, np.dtype("u1")), (8, np.dtype("u1")))
        )
        self._bits = 8 * self._shape.word.itemsize
        self._head_bytes = _HEAD.size + _PLANE.size * len(self._planes)
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()
        self._scratch: dict[str, Words] = {}

    def bound(self, count: int) -> int:
        return self._head_bytes + self._shape.values(count) * self._shape.word.itemsize

    def encode(self, keys: Tensor, values: Tensor, into: memoryview) -> int:
        shape, count = self._shape, keys.shape[0]
        both = (shape.words(keys, count), shape.words(values, count))
        total, tile = shape.values(count), count * shape.head_dim
        stored = self._stored_planes(both[0][:, 0, :])
        table: list[tuple[int, int]] = [(0, 0)] * len(self._planes)
        planes, end = [], self._head_bytes
        for index, (_, dtype) in enumerate(self._planes):
            if stored[index]:
                planes.append(np.frombuffer(into, dtype, total, end))
                table[index] = (end, total * dtype.itemsize)
                end += total * dtype.itemsize
            else:
                planes.append(self._room(f"plane{index}", total, dtype))
        for at, words in enumerate(w[:, head, :] for w in both for head in range(shape.heads)):
            self._split(words, [plane[at * tile : (at + 1) * tile] for plane in planes])
        for index, plane in enumerate(planes):
            if not stored[index]:
                packed = self._compressor.compress(plane.data)
                body = packed if len(packed) < plane.nbytes else plane.tobytes()
                into[end : end + len(body)] = body
                table[index] = (end, len(body))
                end += len(body)
        _HEAD.pack_into(into, 0, _MAGIC, count)
        for index, entry in enumerate(table):
            _PLANE.pack_into(into, _HEAD.size + index * _PLANE.size, *entry)
        return end

    def _stored_planes(self, sample: Words) -> list[bool]:
        """Which planes to store uncompressed: every mantissa plane whose sample does not shrink."""
        words = np.ascontiguousarray(sample[: max(1, _PROBE_BYTES // self._shape.head_dim)])
        planes = [np.empty(words.size, dtype) for _, dtype in self._planes]
        self._split(words, planes)
        probes = [len(self._compressor.compress(plane.data)) >= _PAYS * plane.nbytes for plane in planes[:-1]]
        return [*probes, False]

    def _split(self, words: Words, planes: list[Words]) -> None:
        """Rotates ``words`` [tokens, head_dim] and deals their bytes out to ``planes`` [tokens * head_dim]."""
        rotated = self._room("rotated", words.size, self._shape.word)
        shifted = self._room("shifted", words.size, self._shape.word)
        np.left_shift(words, 1, out=rotated.reshape(words.shape))
        np.right_shift(words, self._bits - 1, out=shifted.reshape(words.shape))
        np.bitwise_or(rotated, shifted, out=rotated)
        for (shift, _), plane in zip(self._planes, planes, strict=True):
            if shift:
                np.right_shift(rotated, shift, out=shifted)
            np.copyto(plane, shifted if shift else rotated, casting="unsafe")

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        total, tile = self._shape.values(count), count * self._shape.head_dim
        planes = [
            self._plane(data[offset : offset + size], dtype, total)
            for (offset, size), (_, dtype) in zip(self._table(data, count), self._planes, strict=True)
        ]
        out = self._room("decoded", total, self._shape.word)
        carry = self._room("shifted", tile, self._shape.word)
        for at in range(0, total, tile):  # tiles of one head stay in the cache
            words = out[at : at + tile]
            np.copyto(words, planes[-1][at : at + tile])
            for plane in reversed(planes[:-1]):
                np.left_shift(words, 8 * plane.itemsize, out=words)
                np.bitwise_or(words, plane[at : at + tile], out=words)
            np.left_shift(words, self._bits - 1, out=carry)
            np.right_shift(words, 1, out=words)
            np.bitwise_or(words, carry, out=words)
        return self._shape.tensors(out, count)

    def _table(self, data: memoryview, count: int) -> list[tuple[int, int]]:
        """Offset and size of every plane; together they must tile the bytes after the header."""
        if len(data) < self._head_bytes:
            raise CodecError(f"lossless block of {len(data)} bytes has no header")
        magic, tokens = _HEAD.unpack_from(data)
        if magic != _MAGIC or tokens != count:
            raise CodecError(f"lossless block starts with {magic!r} for {tokens} tokens, expected {count}")
        table = [_PLANE.unpack_from(data, _HEAD.size + i * _PLANE.size) for i in range(len(self._planes))]
        end = self._head_bytes
        for offset, size in sorted(table):
            if offset != end or size == 0:
                raise CodecError("lossless block: planes leave gaps or overlap")
            end += size
        if end != len(data):
            raise CodecError(f"lossless block: planes end at {end} of {len(data)} bytes")
        return [(int(offset), int(size)) for offset, size in table]

    def _plane(self, body: memoryview, dtype: np.dtype[Any], total: int) -> Words:
        nbytes = total * dtype.itemsize
        if len(body) == nbytes:
            return np.frombuffer(body, dtype)
        try:
            # The frame's own claim decides what zstd would allocate, so it is read first.
            claimed = zstandard.frame_content_size(body)
            if len(body) > nbytes or claimed != nbytes:
                raise CodecError(f"lossless block: plane of {claimed} bytes, expected {nbytes}")
            return np.frombuffer(self._decompressor.decompress(body, allow_extra_data=False), dtype)
        except zstandard.ZstdError as error:
            raise CodecError(f"lossless block: {error}") from None

    def _room(self, use: str, size: int, dtype: np.dtype[Any]) -> Words:
        have = self._scratch.get(use)
        if have is None or have.size < size or have.dtype != dtype:
            have = self._scratch[use] = np.empty(size, dtype)
        return have[:size]


class Int8Codec:
    """Lossy: per token, head and group of at most 64 values a bfloat16 scale and one signed byte per value.

    ``|decoded - value| <= scale / 2`` before rounding to the layout's dtype, where the scale is the group's largest
    magnitude over 127, rounded up to bfloat16: at most 0.4 % of that magnitude. KV that is not finite is refused.
    """

    name = "int8"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = _Shape(layout)
        self._group = next(size for size in range(min(64, layout.head_dim), 0, -1) if layout.head_dim % size == 0)

    def _groups(self, count: int) -> int:
        return self._shape.values(count) // self._group

    def bound(self, count: int) -> int:
        return self._shape.values(count) + 2 * self._groups(count)

    def encode(self, keys: Tensor, values: Tensor, into: memoryview) -> int:
        shape, count = self._shape, keys.shape[0]
        shape.words(keys, count), shape.words(values, count)  # checks the shapes
        both = torch.stack((keys, values)).detach().cpu().float().transpose(1, 2)  # [2, heads, count, head_dim]
        x = np.ascontiguousarray(both.numpy()).reshape(-1, self._group)
        largest = np.abs(x).max(axis=1)
        if not np.isfinite(largest).all():
            raise CodecError("int8 cannot carry KV that is not finite")
        scales = ((largest / np.float32(127)).view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
        steps = scales.view(np.float32)[:, None]
        levels = np.divide(x, steps, out=np.zeros_like(x), where=steps > 0)
        groups = self._groups(count)
        np.frombuffer(into, "<u2", groups)[:] = scales >> 16
        quantized = np.frombuffer(into, np.int8, x.size, 2 * groups)
        np.copyto(quantized, np.clip(np.rint(levels), -127, 127).reshape(-1), casting="unsafe")
        return self.bound(count)

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        if len(data) != self.bound(count):
            raise CodecError(f"int8 block of {len(data)} bytes, expected {self.bound(count)}")
        shape, groups = self._shape, self._groups(count)
        steps = (np.frombuffer(data, "<u2", groups).astype(np.uint32) << 16).view(np.float32)
        if not (np.isfinite(steps).all() and (steps >= 0).all()):
            raise CodecError("int8 block: a scale is negative or not finite")
        levels = np.frombuffer(data, np.int8, offset=2 * groups).reshape(-1, self._group)
        x = torch.from_numpy(levels * steps[:, None])
        both = x.to(shape._torch_dtype).view(2, shape.heads, count, shape.head_dim)
        return both[0].transpose(0, 1), both[1].transpose(0, 1)
