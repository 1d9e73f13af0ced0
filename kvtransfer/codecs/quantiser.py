"""What turns K or V into levels and back, compiled where there is a compiler."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvtransfer.codecs import native
from kvtransfer.codecs.block import Words
from kvtransfer.codecs.compiled import NativeQuantiser
from kvtransfer.codecs.grid import Grid
from kvtransfer.codecs.reference import TorchQuantiser


class Quantiser(Protocol):
    """Scales, steps and middles are bfloat16 bits. x: [count, heads, head_dim] with its heads side by side; out:
    [heads, count, head_dim] with its tokens side by side. Methods that read KV or bytes raise :class:`CodecError` for
    what no codec may carry."""

    def quantise(self, x: Tensor, grid: Grid, scales: Words, middles: Words, levels: Words) -> None:
        """Fills packed ``levels`` and the rest, of the sizes that ``grid`` says."""

    def dequantise(self, grid: Grid, scales: Words, middles: Words, levels: Words, out: Tensor) -> None: ...

    def quantise_even(self, x: Tensor, resolution: float, steps: Words, middles: Words, levels: Words) -> None:
        """One step a head, ``resolution`` of them in the typical half range of its channels, and one middle a channel.

        steps: [heads]; middles: [heads * head_dim]; levels: [heads * head_dim, count] signed bytes, not packed.
        """

    def dequantise_even(self, steps: Words, middles: Words, levels: Words, out: Tensor) -> None: ...

    def pack(self, levels: Words, width: int, into: Words) -> None:
        """``levels`` of ``width`` bits into :func:`kvtransfer.codecs.grid.packed_bytes`."""

    def unpack(self, packed: Words, width: int, levels: Words) -> None: ...


def choose_quantiser() -> Quantiser:
    """Compiled where there is a compiler."""
    library = native.load()
    return TorchQuantiser() if library is None else NativeQuantiser(library)
