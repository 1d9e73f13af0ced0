"""KV between rows of pages in host memory and other tensors, in compiled loops, and ``raw`` straight from and to pages.

A block of 512 tokens of three bfloat16 heads of 64, once a layer of every prompt, takes 50 µs this way on an AMD Milan
core from pages to staging memory; gathered first and encoded then it takes 230 (docs/handoff.md). Tensors over the
block's bytes would take another 25: raw blocks are walked by address.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from baton.layout import KVLayout
from kvtransfer.codecs import native
from kvtransfer.codecs.block import CodecError, Shape


def gather_rows(rows: Tensor, slots: Tensor, to: Tensor) -> None:
    """Copies ``rows`` [cache rows, heads, head_dim] at ``slots`` [count] int64 to ``to`` [count, heads, head_dim].

    All in host memory and of one dtype, values of a head side by side, heads of a row too. Raises IndexError for slots
    outside, before anything is copied.
    """
    library = native.load()
    if library is None:
        to.copy_(rows.index_select(0, _inside(rows, slots)))
    elif library.gather(*_places(rows, slots, to)):
        raise IndexError(f"slots outside {rows.shape[0]} rows")


def scatter_rows(rows: Tensor, slots: Tensor, values: Tensor) -> None:
    """The other way: copies ``values`` [count, heads, head_dim] to ``rows`` at ``slots``."""
    library = native.load()
    if library is None:
        rows.index_copy_(0, _inside(rows, slots), values)
    elif library.scatter(*_places(rows, slots, values)):
        raise IndexError(f"slots outside {rows.shape[0]} rows")


def _inside(rows: Tensor, slots: Tensor) -> Tensor:
    """``slots``, all of them in ``rows``: torch would find out after it has copied some."""
    if bool(((slots < 0) | (slots >= rows.shape[0])).any()):
        raise IndexError(f"slots outside {rows.shape[0]} rows")
    return slots


def _places(rows: Tensor, slots: Tensor, other: Tensor) -> tuple[int, ...]:
    """Both functions' arguments in C. Raises ValueError for tensors that they cannot walk."""
    size = other.element_size()
    if not (rows.dtype == other.dtype and other.stride(2) == 1 and slots.shape == other.shape[:1] and other.is_cpu):
        raise ValueError(f"{rows.shape} {rows.dtype} at {slots.shape}, and {other.shape} {other.dtype}")
    return *_paged(rows, slots, other.shape[1:]), other.data_ptr(), other.stride(0) * size, other.stride(1) * size


def _paged(rows: Tensor, slots: Tensor, row: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the arguments that say where in pages tokens lie, ``row`` [heads, head_dim] each."""
    heads, head_dim = row
    if not (
        rows.shape[1:] == row and rows.stride()[1:] == (head_dim, 1) and rows.is_cpu
        and slots.dtype == torch.int64 and slots.is_contiguous() and slots.is_cpu
    ):  # fmt: skip
        raise ValueError(f"{rows.shape} {rows.dtype} at {slots.shape} {slots.dtype}, and rows of {tuple(row)}")
    size = rows.element_size()
    return (
        rows.data_ptr(), rows.shape[0], rows.stride(0) * size, slots.data_ptr(), slots.shape[0], heads, head_dim * size
    )  # fmt: skip


class HostRaw:
    """``raw`` from and to pages in host memory: a :class:`kvtransfer.codecs.paged.PagedCodec` of one copy."""

    name = "raw"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = Shape(layout)
        self._row = (2 * self._shape.heads, self._shape.head_dim)
        self._head_bytes = self._shape.head_dim * self._shape.word.itemsize

    def bound(self, count: int) -> int:
        return count * self._row[0] * self._head_bytes

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        nbytes = self.bound(slots.shape[0])
        library = native.load()
        if library is None:
            gather_rows(layer, slots, self._block(into[:nbytes], slots.shape[0]))
        elif library.gather(*self._places(layer, slots, into[:nbytes])):
            raise IndexError(f"slots outside {layer.shape[0]} rows")
        return nbytes

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        library = native.load()
        if len(data) != self.bound(slots.shape[0]):
            raise CodecError(f"raw block of {len(data)} bytes, expected {self.bound(slots.shape[0])}")
        if library is None:
            scatter_rows(layer, slots, self._block(data, slots.shape[0]))
        elif library.scatter(*self._places(layer, slots, data)):
            raise IndexError(f"slots outside {layer.shape[0]} rows")

    def _places(self, layer: Tensor, slots: Tensor, block: memoryview) -> tuple[int, ...]:
        count = slots.shape[0]
        if layer.dtype != self._shape.dtype or len(block) != self.bound(count):
            raise ValueError(f"{layer.dtype} at {count} slots, and {len(block)} bytes of {self._shape.dtype}")
        return *_paged(layer, slots, self._row), _address(block), self._head_bytes, count * self._head_bytes

    def _block(self, data: memoryview, count: int) -> Tensor:
        """A block's bytes as [count, 2 * kv_heads, head_dim]."""
        words = torch.frombuffer(data, dtype=self._shape.dtype)
        return words.view(self._row[0], count, self._row[1]).transpose(0, 1)


def _address(block: memoryview) -> int:
    if block.readonly:
        return int(np.frombuffer(block, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
