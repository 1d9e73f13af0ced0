"""KV between rows of pages in host memory and other tensors, in compiled loops, and ``raw`` straight from and to pages.

A block of 512 tokens of three bfloat16 heads of 64, once a layer of every prompt, takes 50 µs this way on an AMD Milan
core from pages to staging memory; gathered first and encoded then it takes 230 (docs/handoff.md).
"""

from __future__ import annotations

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
    count, heads, head_dim = other.shape
    size = other.element_size()
    if not (
        rows.dtype == other.dtype and rows.shape[1:] == other.shape[1:] and rows.stride()[1:] == (head_dim, 1)
        and other.stride(2) == 1 and slots.shape == (count,) and slots.dtype == torch.int64 and slots.is_contiguous()
        and rows.is_cpu and other.is_cpu and slots.is_cpu
    ):  # fmt: skip
        raise ValueError(f"{rows.shape} {rows.dtype} at {slots.shape}, and {other.shape} {other.dtype}")
    return (
        rows.data_ptr(), rows.shape[0], rows.stride(0) * size, slots.data_ptr(), count, heads, head_dim * size,
        other.data_ptr(), other.stride(0) * size, other.stride(1) * size,
    )  # fmt: skip


class HostRaw:
    """``raw`` from and to pages in host memory: a :class:`kvtransfer.codecs.paged.PagedCodec` of one copy."""

    name = "raw"

    def __init__(self, layout: KVLayout) -> None:
        self._shape = Shape(layout)

    def bound(self, count: int) -> int:
        return self._shape.values(count) * self._shape.word.itemsize

    def encode(self, layer: Tensor, slots: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        nbytes = self.bound(len(slots))
        gather_rows(layer, slots, self._block(into[:nbytes], len(slots)))
        return nbytes

    def decode(self, data: memoryview, layer: Tensor, slots: Tensor) -> None:
        if len(data) != self.bound(len(slots)):
            raise CodecError(f"raw block of {len(data)} bytes, expected {self.bound(len(slots))}")
        scatter_rows(layer, slots, self._block(data, len(slots)))

    def _block(self, data: memoryview, count: int) -> Tensor:
        """A block's bytes as [count, 2 * kv_heads, head_dim]."""
        shape = self._shape
        words = torch.frombuffer(data, dtype=shape.dtype)
        return words.view(2 * shape.heads, count, shape.head_dim).transpose(0, 1)
