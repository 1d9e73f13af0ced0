"""Tokens' KV between pages and tensors in host memory, copied head by head.

For 512 tokens of three bfloat16 heads of 64, once a layer of every prompt that lands, ``index_copy_`` after a
concatenation takes 219 µs on an AMD Milan core and this 49; gathering 150 and 51 (docs/handoff.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Slots: TypeAlias = npt.NDArray[np.intp]


def slots_of(pages: Sequence[int], start: int, count: int, page_tokens: int) -> Slots:
    """Rows of tokens ``[start, start + count)``; raises IndexError when the pages do not hold them."""
    if start < 0 or count < 0 or start + count > len(pages) * page_tokens:
        raise IndexError(f"tokens [{start}, {start + count}) lie outside {len(pages)} pages of {page_tokens}")
    first = start // page_tokens
    table = np.array(pages[first : -(-(start + count) // page_tokens)], dtype=np.intp)
    rows = (table[:, None] * page_tokens + np.arange(page_tokens)).reshape(-1)
    return rows[start - first * page_tokens :][:count]


def gather(layer: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """K and V at ``slots`` of ``layer`` [rows, 2 * heads, head_dim]: contiguous copies, [count, heads, head_dim]."""
    rows, words = _heads(layer), _words(layer)
    heads, head_dim = rows.shape[1] // 2, words.shape[2]
    keys, values = (
        torch.from_numpy(part[slots].view(words.dtype).reshape(len(slots), heads, head_dim)).view(layer.dtype)
        for part in (rows[:, :heads], rows[:, heads:])
    )
    return keys, values


def scatter(layer: Tensor, slots: Slots, keys: Tensor, values: Tensor) -> None:
    """Writes K and V, of the layer's dtype and with any strides but the last, to ``slots`` of ``layer``."""
    rows, heads = _heads(layer), keys.shape[1]
    rows[:, :heads][slots] = _heads(keys)
    rows[:, heads:][slots] = _heads(values)


def _heads(tensor: Tensor) -> npt.NDArray[Any]:
    """[tokens, heads] over the memory of a [tokens, heads, head_dim] tensor: what numpy copies as one piece."""
    words = _words(tensor)
    return words.view(f"V{words.shape[2] * words.itemsize}")[..., 0]


def _words(tensor: Tensor) -> npt.NDArray[Any]:
    words: npt.NDArray[Any] = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
    return words
