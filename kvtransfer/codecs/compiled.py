"""Quantising in compiled loops."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtransfer.codecs.block import REFUSAL, UNREADABLE, CodecError, Words
from kvtransfer.codecs.grid import Grid
from kvtransfer.codecs.native import Library


class NativeQuantiser:
    """See :class:`kvtransfer.codecs.quantiser.Quantiser`."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def quantise(self, x: Tensor, grid: Grid, scales: Words, middles: Words, levels: Words) -> None:
        count, heads, head_dim = x.shape
        refused = self._library.quantise(
            x.data_ptr(), x.dtype == torch.bfloat16, grid.tokens > 0, count, x.stride(0), heads, head_dim,
            grid.group(head_dim), grid.largest, grid.width, grid.e4m3,
            scales.ctypes.data, middles.ctypes.data, levels.ctypes.data,
        )  # fmt: skip
        if refused:
            raise CodecError(REFUSAL)

    def dequantise(self, grid: Grid, scales: Words, middles: Words, levels: Words, out: Tensor) -> None:
        heads, count, head_dim = out.shape
        wrong = self._library.dequantise(
            scales.ctypes.data, middles.ctypes.data, levels.ctypes.data, out.dtype == torch.bfloat16, grid.tokens > 0,
            count, heads, head_dim, grid.group(head_dim), grid.largest, grid.width, grid.e4m3, out.stride(0),
            out.data_ptr(),
        )  # fmt: skip
        if wrong:
            raise CodecError(UNREADABLE)

    def quantise_even(self, x: Tensor, resolution: float, steps: Words, middles: Words, levels: Words) -> None:
        count, heads, head_dim = x.shape
        refused = self._library.quantise_even(
            x.data_ptr(), x.dtype == torch.bfloat16, count, x.stride(0), heads, head_dim, resolution,
            steps.ctypes.data, middles.ctypes.data, levels.ctypes.data,
        )  # fmt: skip
        if refused:
            raise CodecError(REFUSAL)

    def dequantise_even(self, steps: Words, middles: Words, levels: Words, out: Tensor) -> None:
        heads, count, head_dim = out.shape
        wrong = self._library.dequantise_even(
            steps.ctypes.data, middles.ctypes.data, levels.ctypes.data, out.dtype == torch.bfloat16,
            count, heads, head_dim, out.stride(0), out.data_ptr(),
        )  # fmt: skip
        if wrong:
            raise CodecError(UNREADABLE)

    def pack(self, levels: Words, width: int, into: Words) -> None:
        self._library.pack(levels.ctypes.data, levels.size, width, into.ctypes.data)

    def unpack(self, packed: Words, width: int, levels: Words) -> None:
        self._library.unpack(packed.ctypes.data, levels.size, width, levels.ctypes.data)
