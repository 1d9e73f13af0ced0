"""What a codec is, and what every codec needs to know of a block: one layer's K and V of some tokens.

The wire layout is canonical and knows no pages: K then V, per KV head, token after token, ``head_dim`` values,
little-endian. A codec object belongs to one thread: it keeps its compressor and scratch memory.

Sizes found in the bytes are checked against what the block's token count allows before anything is allocated.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.errors import BatonError
from baton.layout import DTYPE_BYTES, KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Words: TypeAlias = npt.NDArray[Any]  # unsigned integers that carry the values' bits


REFUSAL = "KV that is not finite, or of 2^127 and more, cannot be quantised"
UNREADABLE = "a scale is negative or not finite, or a value is not a finite number"


class CodecError(BatonError):
    """A block cannot be encoded by this codec, or its bytes are not what the codec writes."""


class Codec(Protocol):
    name: str

    def bound(self, count: int) -> int:
        """Most bytes that ``count`` tokens of one layer can take."""

    def encode(self, keys: Tensor, values: Tensor, into: memoryview, *, before: int = 0, after: int = 0) -> int:
        """Writes the block at the start of ``into`` (``bound`` bytes) and returns its size.

        keys, values: [count, kv_heads, head_dim]. ``before`` and ``after``: how many of the prompt's tokens precede
        and follow the block; a codec may keep the prompt's ends at full precision. Raises :class:`CodecError`.
        """

    def decode(self, data: memoryview, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [count, kv_heads, head_dim] each, maybe strided. Raises :class:`CodecError`.

        They share memory with ``data`` or with the codec and stay valid until the next call.
        """


class Scratch:
    """Memory that a codec uses again and again."""

    def __init__(self) -> None:
        self._rooms: dict[str, Words] = {}

    def room(self, use: str, size: int, dtype: np.dtype[Any]) -> Words:
        have = self._rooms.get(use)
        if have is None or have.size < size or have.dtype != dtype:
            have = self._rooms[use] = np.empty(size, dtype)
        return have[:size]


class Shape:
    """What every codec needs to know about a layout."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.heads, self.head_dim = layout.kv_heads, layout.head_dim
        self.word = np.dtype(f"<u{DTYPE_BYTES[layout.dtype]}")
        self.dtype = TORCH_DTYPES[layout.dtype]
        self._torch_word = torch.int32 if layout.dtype == "float32" else torch.int16

    def values(self, count: int) -> int:
        return 2 * self.heads * count * self.head_dim

    def checked(self, tensor: Tensor, count: int) -> Tensor:
        """One of K, V: [count, heads, head_dim], in host memory with its heads side by side; copied only if need be."""
        if tensor.shape != (count, self.heads, self.head_dim) or tensor.dtype != self.dtype:
            raise CodecError(f"block of {tuple(tensor.shape)} {tensor.dtype}, expected {self.layout}")
        tensor = tensor.detach().cpu()
        side_by_side = tensor.stride()[1:] == (self.head_dim, 1) and tensor.stride(0) >= self.heads * self.head_dim
        return tensor if side_by_side else tensor.contiguous()

    def words(self, tensor: Tensor) -> Words:
        """The bits of a tensor in host memory."""
        words: Words = tensor.view(self._torch_word).numpy().view(self.word)
        return words

    def canonical(self, words: Words, count: int) -> Tensor:
        """``words`` [2 * heads * count * head_dim] as a tensor [2, heads, count, head_dim] over the same memory."""
        signed = words.view(words.dtype.str.replace("u", "i"))
        return torch.from_numpy(signed).view(self.dtype).view(2, self.heads, count, self.head_dim)

    def tensors(self, words: Words, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values over canonical ``words``."""
        both = self.canonical(words, count)
        return both[0].transpose(0, 1), both[1].transpose(0, 1)
