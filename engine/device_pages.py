"""One GPU's whole KV cache, as a handoff's kernels reach it from threads and streams of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.cache import KVCache, Locate, PagedKV

if TYPE_CHECKING:
    from engine.kernels.codec import PagedKernels


class DevicePages:
    """``locator`` may be called from any thread; ``mark`` belongs to the thread that computes."""

    def __init__(self, cache: KVCache) -> None:
        from engine.kernels.codec import PagedKernels  # Triton, which only CUDA needs

        self._cache = cache
        self.device = cache.layers[0].device
        self.kernels: PagedKernels = PagedKernels()

    def locator(self, pages: Sequence[int]) -> Locate:
        """As :meth:`engine.cache.KVCache.locator`."""
        return self._cache.locator(pages)

    def mark(self) -> Callable[[], None]:
        """What it returns makes the stream of whichever thread calls it wait for all that is launched by now."""
        if self.device.type != "cuda":  # kernels interpreted on the CPU: it has happened
            return _nothing
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return partial(_await, event, self.device)


def device_pages(cache: PagedKV) -> DevicePages | None:
    """None where KV lies in host memory, or on several ranks' GPUs."""
    if not isinstance(cache, KVCache) or cache.layers[0].is_cpu:
        return None
    return DevicePages(cache)


def _await(event: torch.cuda.Event, device: torch.device) -> None:
    torch.cuda.current_stream(device).wait_event(event)


def _nothing() -> None:
    pass
