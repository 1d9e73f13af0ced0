"""The ladder for KV that lies in an accelerator's pages: blocks are encoded there and leave as bytes.

The kernels come from outside (``engine.kernels.codec.PagedKernels``), so that nothing here imports Triton. A block that
these codecs write is byte for byte the one of :func:`kvtransfer.codecs.make_codec`'s codec of the same name, and either
reads the other's; only lossless blocks may differ in which planes are compressed. ``int6-zstd`` and the entropy coded
levels below it have no form here: their coder is the CPU's.

The sending side calls ``encode(layer, slots, into)`` on a view of the staging arena, whose pages should be registered
with the driver (pinned) beforehand; the receiving side calls ``decode(data, layer, slots)`` on a landing buffer whose
digest has been checked. Both wait for the calling thread's stream: when ``encode`` returns, the pages may be written
again and the bytes are in ``into``; when ``decode`` returns, the tokens are in the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs.block import REFUSAL, CodecError, Shape, Words
from kvtransfer.codecs.ends import HEAD, Kept
from kvtransfer.codecs.grid import Grid
from kvtransfer.codecs.lossless import LosslessCodec
from kvtransfer.codecs.quantised import LADDER, QuantisedCodec

Arrays: TypeAlias = tuple[Tensor, Tensor, Tensor]  # scales, middles (int16), levels (uint8); over a block's bytes
_SURE = 2.0**118  # scales and middles below it decode to finite values, whatever the levels


class Kernels(Protocol):
    """rows: [cache rows, kv_heads, head_dim] of K or V, heads side by side; slots: [count] int64, on the device."""

    def quantise(self, rows: Tensor, slots: Tensor, grid: Grid, arrays: Arrays) -> None:
        """Fills ``arrays``, sized as ``grid`` says; an infinite scale refuses."""

    def dequantise(self, rows: Tensor, slots: Tensor, grid: Grid, arrays: Arrays) -> None: ...

    def gather(self, rows: Tensor, slots: Tensor, words: Tensor) -> None:
        """words: [kv_heads, count, head_dim] of the rows' dtype."""

    def scatter(self, words: Tensor, rows: Tensor, slots: Tensor) -> None: ...

    def split(self, rows: Tensor, slots: Tensor, planes: list[Tensor]) -> None:
        """planes: [kv_heads, count, head_dim] each, as :class:`kvtransfer.codecs.planes.Planes` deals them out."""

    def join(self, planes: list[Tensor], rows: Tensor, slots: Tensor) -> None: ...


class PagedCodec(Protocol):
    """layer: [cache rows, 2 * kv_heads, head_dim] in the layout's dtype, K heads first; slots: [count] int64, the
    tokens' rows; both on the device. ``before`` and ``after`` as for :class:`kvtransfer.codecs.Codec`. Both methods
    raise :class:`CodecError`."""

    name: str

    def bound(self, count: int) -> int: ...

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        """Writes the block of ``slots`` at the start of ``into`` and returns its size."""

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        """Writes the block's tokens to ``layer`` at ``slots``; nothing, if it raises."""


def make_paged(name: str, layout: KVLayout, kernels: Kernels) -> PagedCodec | None:
    """The codec called ``name`` for pages on a device; None where only the CPU has it."""
    match name:
        case "raw":
            return PagedRaw(layout, kernels)
        case "lossless":
            return PagedLossless(layout, kernels)
    return PagedQuantised(name, layout, kernels) if name in LADDER else None


class PagedRaw:
    name = "raw"

    def __init__(self, layout: KVLayout, kernels: Kernels) -> None:
        self._shape, self._kernels = Shape(layout), kernels

    def bound(self, count: int) -> int:
        return self._shape.values(count) * self._shape.word.itemsize

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        words = torch.empty(
            2, self._shape.heads, len(slots), self._shape.head_dim, dtype=layer.dtype, device=layer.device
        )
        for half, part in zip(layer.chunk(2, dim=1), words, strict=True):
            self._kernels.gather(half, slots, part)
        return _out(words.flatten().view(torch.uint8), into)

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        if len(data) != self.bound(len(slots)):
            raise CodecError(f"raw block of {len(data)} bytes, expected {self.bound(len(slots))}")
        words = _in(data, layer).view(layer.dtype).view(2, self._shape.heads, len(slots), -1)
        for half, part in zip(layer.chunk(2, dim=1), words, strict=True):
            self._kernels.scatter(part, half, slots)
        wait_for(layer)


class PagedLossless:
    """Planes are split and joined on the device; the exponents' are compressed and expanded here."""

    name = "lossless"

    def __init__(self, layout: KVLayout, kernels: Kernels) -> None:
        self._shape, self._kernels, self._host = Shape(layout), kernels, LosslessCodec(layout)

    def bound(self, count: int) -> int:
        return self._host.bound(count)

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        count = len(slots)

        def split(planes: Sequence[Words]) -> None:
            made = [self._room(count, plane.itemsize, layer.device) for plane in planes]
            for index, half in enumerate(layer.chunk(2, dim=1)):
                self._kernels.split(half, slots, [plane[index] for plane in made])
            for plane, room in zip(made, planes, strict=True):
                room[:] = plane.flatten().cpu().numpy().view(room.dtype)

        return self._host.encode_planes(count, self._host.mantissas, split, into)

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        made = []
        for plane in self._host.decode_planes(data, len(slots)):
            room = self._room(len(slots), plane.itemsize, layer.device)
            signed = plane.view("<i2") if plane.itemsize == 2 else plane
            made.append(room.copy_(torch.from_numpy(signed.copy()).view(room.shape)))
        for index, half in enumerate(layer.chunk(2, dim=1)):
            self._kernels.join([plane[index] for plane in made], half, slots)
        wait_for(layer)

    def _room(self, count: int, itemsize: int, device: torch.device) -> Tensor:
        dtype = torch.int16 if itemsize == 2 else torch.uint8
        return torch.empty(2, self._shape.heads, count, self._shape.head_dim, dtype=dtype, device=device)


class PagedQuantised:
    def __init__(self, name: str, layout: KVLayout, kernels: Kernels) -> None:
        self.name = name
        self._shape, self._kernels = Shape(layout), kernels
        self._host = QuantisedCodec(name, LADDER[name], layout, compress=False)
        self._grids = (LADDER[name].keys, LADDER[name].values)

    def bound(self, count: int) -> int:
        return self._host.bound(count)

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        count, halves = len(slots), layer.chunk(2, dim=1)
        kept = self._host.ends.of(count, before, after)
        block = torch.empty(self.bound(count), dtype=torch.uint8, device=layer.device)
        end = self._host.ends.head_bytes
        for part in _ends(slots, kept):
            for half, words in zip(halves, self._exact(block, end, len(part), layer.dtype), strict=True):
                self._kernels.gather(half, part, words)
            end += len(part) * self._host.ends.token_bytes
        middle, scales_at = slots[kept.first : count - kept.last], end
        if len(middle):
            parts, end = self._parts(block, len(middle), end)
            for half, grid, arrays in zip(halves, self._grids, parts, strict=True):
                self._kernels.quantise(half, middle, grid, arrays)
        _out(block[:end], into)
        if self._host.ends.any:
            HEAD.pack_into(into, 0, kept.first, kept.last)
        if len(middle) and self._largest_scale(into, len(middle), scales_at) == float("inf"):
            raise CodecError(REFUSAL)
        return end

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        count, halves = len(slots), layer.chunk(2, dim=1)
        kept = self._host.ends.read(data, count)
        middle, end = slots[kept.first : count - kept.last], self._host.ends.head_bytes
        self._host.check_size(len(data), kept.tokens, len(middle))
        scales_at = end + kept.tokens * self._host.ends.token_bytes
        if len(middle) and not self._surely_finite(data, len(middle), scales_at):
            keys, values = self._host.decode(data, count)  # which refuses it or shows that all is well
            layer[slots] = torch.cat((keys, values), dim=1).to(layer)
            wait_for(layer)
            return
        block = _in(data, layer)
        for part in _ends(slots, kept):
            for half, words in zip(halves, self._exact(block, end, len(part), layer.dtype), strict=True):
                self._kernels.scatter(words, half, part)
            end += len(part) * self._host.ends.token_bytes
        if len(middle):
            for half, grid, arrays in zip(halves, self._grids, self._parts(block, len(middle), end)[0], strict=True):
                self._kernels.dequantise(half, middle, grid, arrays)
        wait_for(layer)

    def _exact(self, block: Tensor, at: int, some: int, dtype: torch.dtype) -> Tensor:
        """[2, kv_heads, some, head_dim] over the block's bytes."""
        nbytes = some * self._host.ends.token_bytes
        return block[at : at + nbytes].view(dtype).view(2, self._shape.heads, some, self._shape.head_dim)

    def _parts(self, block: Tensor, count: int, at: int) -> tuple[list[Arrays], int]:
        """Scales, middles and levels of K and of V over the block's bytes, and where they end."""
        size = count, self._shape.heads, self._shape.head_dim
        arrays = []
        for grid in self._grids:
            for number in (grid.groups(*size), grid.middles(*size)):
                arrays.append(block[at : at + 2 * number].view(torch.int16))
                at += 2 * number
        levels = []
        for nbytes in self._host.level_bytes(count):
            levels.append(block[at : at + nbytes])
            at += nbytes
        return [(arrays[0], arrays[1], levels[0]), (arrays[2], arrays[3], levels[1])], at

    def _largest_scale(self, data: memoryview, count: int, at: int) -> float:
        """In magnitude, middles included; NaN where there is one."""
        words = np.frombuffer(data, "<u2", self._host.scale_bytes(count) // 2, at)
        return float(((words.astype(np.uint32) & 0x7FFF) << 16).view(np.float32).max())

    def _surely_finite(self, data: memoryview, count: int, at: int) -> bool:
        """Whether scales are as an encoder writes them, with room for every product."""
        if not self._largest_scale(data, count, at) < _SURE:
            return False
        pairs, end = self._host.scales(data, count, at)
        if any((scales >> 15).any() for scales, _ in pairs):
            return False
        levels = np.frombuffer(data, np.uint8, offset=end)
        return not (self._grids[0].e4m3 and ((levels & 0x7F) == 0x7F).any())


def _ends(slots: Tensor, kept: Kept) -> list[Tensor]:
    """The slots of the tokens that are kept exactly, where there are any."""
    return [part for part in (slots[: kept.first], slots[len(slots) - kept.last :]) if len(part)]


def wait_for(layer: Tensor) -> None:
    """Returns when all that the calling thread launched on the layer's device has happened."""
    if layer.is_cuda:
        torch.cuda.current_stream(layer.device).synchronize()


def _out(block: Tensor, into: memoryview) -> int:
    """Copies bytes from the device, which has written them when it returns; returns how many."""
    torch.frombuffer(into, dtype=torch.uint8)[: len(block)].copy_(block)
    return len(block)


def _in(data: memoryview, layer: Tensor) -> Tensor:
    """``data`` on the layer's device, in memory of its own: aligned, and never written by a peer."""
    return torch.empty(len(data), dtype=torch.uint8, device=layer.device).copy_(
        torch.frombuffer(data, dtype=torch.uint8)
    )
