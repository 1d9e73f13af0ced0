"""Words of K or V taken apart into byte planes and joined again: in numpy, and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kvtransfer.codecs import native
from kvtransfer.codecs.block import Scratch, Words

# By word size, least significant first: what is left of a word's top byte needs no splitting, it is never compressed
# unless all of it is.
DTYPES: dict[int, tuple[np.dtype[Any], ...]] = {
    4: (np.dtype("<u2"), np.dtype("u1"), np.dtype("u1")),
    2: (np.dtype("u1"), np.dtype("u1")),
}


class Planes(Protocol):
    dtypes: tuple[np.dtype[Any], ...]

    def split(self, words: Words, planes: Sequence[Words]) -> None:
        """Rotates ``words`` [tokens, heads, head_dim] left by one bit and deals their bytes out to ``planes``, each
        [heads * tokens * head_dim] in canonical order."""

    def join(self, planes: Sequence[Words], words: Words) -> None:
        """The inverse, to canonical ``words``."""


class NumpyPlanes:
    """The reference, and what runs without a compiler."""

    def __init__(self, word_bytes: int) -> None:
        self.dtypes = DTYPES[word_bytes]
        self._word, self._bits = np.dtype(f"<u{word_bytes}"), 8 * word_bytes
        self._scratch = Scratch()

    def split(self, words: Words, planes: Sequence[Words]) -> None:
        tile = words.shape[0] * words.shape[2]
        for head in range(words.shape[1]):
            self._split(words[:, head], [plane[head * tile : (head + 1) * tile] for plane in planes])

    def _split(self, words: Words, planes: Sequence[Words]) -> None:
        """Of one head: [tokens, head_dim]."""
        rotated = self._scratch.room("rotated", words.size, self._word)
        shifted = self._scratch.room("shifted", words.size, self._word)
        np.left_shift(words, 1, out=rotated.reshape(words.shape))
        np.right_shift(words, self._bits - 1, out=shifted.reshape(words.shape))
        np.bitwise_or(rotated, shifted, out=rotated)
        shift = 0
        for plane in planes:
            np.right_shift(rotated, shift, out=shifted)
            np.copyto(plane, shifted, casting="unsafe")
            shift += 8 * plane.itemsize

    def join(self, planes: Sequence[Words], words: Words) -> None:
        np.copyto(words, planes[-1])
        for plane in reversed(planes[:-1]):
            np.left_shift(words, 8 * plane.itemsize, out=words)
            np.bitwise_or(words, plane, out=words)
        sign = self._scratch.room("shifted", words.size, self._word)
        np.left_shift(words, self._bits - 1, out=sign)
        np.right_shift(words, 1, out=words)
        np.bitwise_or(words, sign, out=words)


class NativePlanes:
    """The same, compiled."""

    def __init__(self, word_bytes: int, library: native.Library) -> None:
        self.dtypes = DTYPES[word_bytes]
        self._split = library.split32 if word_bytes == 4 else library.split16
        self._join = library.join32 if word_bytes == 4 else library.join16

    def split(self, words: Words, planes: Sequence[Words]) -> None:
        tokens, heads, head_dim = words.shape
        stride = words.strides[0] // words.itemsize
        self._split(words.ctypes.data, tokens, stride, heads, head_dim, *(plane.ctypes.data for plane in planes))

    def join(self, planes: Sequence[Words], words: Words) -> None:
        self._join(*(plane.ctypes.data for plane in planes), words.size, words.ctypes.data)


def choose_planes(word_bytes: int) -> Planes:
    """Compiled where there is a compiler."""
    library = native.load()
    return NumpyPlanes(word_bytes) if library is None else NativePlanes(word_bytes, library)
