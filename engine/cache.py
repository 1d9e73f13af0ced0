"""The paged KV cache: one tensor per layer, in which K and V of one token lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch

from baton.layout import KVLayout
from engine import host_rows

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LOCATED = 64  # spans of tokens whose rows a locator remembers

# (layer, start, count) to the layer's cache [cache rows, 2 * kv_heads, head_dim], and which of its rows [count] int64
# hold tokens [start, start + count). Raises IndexError for tokens outside.
Locate: TypeAlias = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]


class PagedKV(Protocol):
    """The KV of tokens in pages, all heads in order, wherever they lie: what a handoff reads and writes.

    Both methods may be called from any thread on pages that the engine thread is not writing.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def bytes(self) -> int: ...

    def gather(self, layer: int, pages: Sequence[int], start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous copies of K and V of tokens ``[start, start + count)``, each [count, kv_heads, head_dim].

        ``pages`` is the block table from token 0 on: token ``t`` lies in ``pages[t // page_tokens]``. Raises IndexError
        for tokens outside.
        """

    def scatter(self, layer: int, pages: Sequence[int], start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes K and V, each [count, kv_heads, head_dim], to tokens ``[start, start + count)`` of ``pages``."""


class KVCache:
    """``layers[i]``: [pages * page_tokens, 2 * kv_heads, head_dim], K heads first.

    One row is one token, so a step's new KV is one indexed write, and a page or token gather moves K and V at once.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        pages: int,
        page_tokens: int,
        device: torch.device,
        memory: torch.Tensor | None = None,
    ) -> None:
        """``memory``: ``pages * page_tokens * layout.token_bytes`` zero bytes to lie in; None takes its own."""
        self.layout = layout
        self.page_tokens = page_tokens
        shape = (pages * page_tokens, 2 * layout.kv_heads, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        if memory is not None:
            self.layers: list[torch.Tensor] = list(memory.view(dtype).view(layout.layers, *shape))
            return
        # Zeros, not garbage: padding rows are read (then masked), and a NaN would survive the mask.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.layers)]

    @property
    def bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def gather(self, layer: int, pages: Sequence[int], start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`PagedKV.gather`, on the cache's device."""
        if self.layers[layer].is_cpu:
            return host_rows.gather(self.layers[layer], host_rows.slots_of(pages, start, count, self.page_tokens))
        keys, values = self.rows(layer, pages, start, count).chunk(2, dim=1)
        return keys.contiguous(), values.contiguous()

    def scatter(self, layer: int, pages: Sequence[int], start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """As :meth:`PagedKV.scatter`, from any device."""
        kept = self.layers[layer]
        if kept.is_cpu and k.is_cpu and k.dtype == v.dtype == kept.dtype:
            host_rows.scatter(kept, host_rows.slots_of(pages, start, k.shape[0], self.page_tokens), k, v)
            return
        self.write_rows(layer, pages, start, torch.cat((k, v), dim=1))

    def rows(self, layer: int, pages: Sequence[int], start: int, count: int) -> torch.Tensor:
        """A copy of tokens ``[start, start + count)``: [count, 2 * kv_heads, head_dim], keys first."""
        return self.layers[layer].index_select(0, self.slots(pages, start, count))

    def write_rows(self, layer: int, pages: Sequence[int], start: int, rows: torch.Tensor) -> None:
        """Writes ``rows``, as :meth:`rows` returns them, to the tokens from ``start`` on."""
        slots = self.slots(pages, start, rows.shape[0])
        self.layers[layer].index_copy_(0, slots, rows.to(self.layers[layer]))

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole pages, every layer. All sources are read before any target is written: they may overlap."""
        if not sources:
            return
        device = self.layers[0].device
        read, written = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in self.layers:
            pages = layer.view(-1, self.page_tokens, *layer.shape[1:])  # [pages, page_tokens, 2 * kv_heads, head_dim]
            pages.index_copy_(0, written, pages.index_select(0, read))

    def locator(self, pages: Sequence[int]) -> Locate:
        """For ``pages``, which stay as they are: tokens' rows are found once for all layers, on one thread."""
        slots = lru_cache(maxsize=_LOCATED)(lambda start, count: self.slots(pages, start, count))
        return lambda layer, start, count: (self.layers[layer], slots(start, count))

    def slots(self, pages: Sequence[int], start: int, count: int) -> torch.Tensor:
        """Rows of tokens ``[start, start + count)`` in every layer: [count] int64, on the device."""
        slots = torch.from_numpy(host_rows.slots_of(pages, start, count, self.page_tokens))
        return slots.to(self.layers[0].device)


def require_inside(pages: Sequence[int], start: int, count: int, page_tokens: int) -> None:
    """Raises IndexError unless ``pages`` hold tokens ``[start, start + count)``."""
    if start < 0 or count < 0 or start + count > len(pages) * page_tokens:
        raise IndexError(f"tokens [{start}, {start + count}) lie outside {len(pages)} pages of {page_tokens}")


def window(pages: Sequence[int], start: int, count: int, page_tokens: int) -> tuple[tuple[int, ...], int]:
    """The part of a block table that tokens ``[start, start + count)`` lie in, and where in it they start. Pure."""
    require_inside(pages, start, count, page_tokens)
    first = start // page_tokens
    return tuple(pages[first : -(-(start + count) // page_tokens)]), start - first * page_tokens
