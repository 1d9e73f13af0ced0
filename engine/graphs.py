"""CUDA graphs of decode steps: one launch instead of a dozen kernels a layer, for a few fixed batch sizes.

A graph replays the same kernels over the same memory, so a step's inputs are copied into buffers that the graph knows,
and its batch is padded to the next captured size. Padding rows write no KV and see no context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.attention import Span
from engine.cache import KVCache
from engine.cuda_ops import ALIGNED, CudaPlan
from engine.model import Batch, Model
from engine.runner import Step

WARM_UPS = 2  # the first compiles kernels and loads cuBLAS, the second finds the allocator's blocks in place
LARGEST = 512  # decodes; a larger step computes for longer than its launches take
COLUMNS = 4  # of the header: token, position, slot written, context


def batch_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 256 and of 64 beyond; the last is ``largest``. Pure.

    Decodes are bound by the weights they read, so that a padding row costs little; a size costs start-up time.
    """
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 64))
    return (*(size for size in sizes if size < largest), largest)


class Inputs:
    """A step's inputs in one int32 buffer, once on the host and once on the device.

    The header comes first, column by column, ``largest`` rows each; then ``largest`` block tables of ``pages`` each.
    """

    def __init__(self, largest: int, pages: int, page_tokens: int, device: torch.device) -> None:
        self._largest, self._pages, self._page_tokens = largest, pages, page_tokens
        self._device = torch.zeros(largest * (COLUMNS + pages), dtype=torch.int32, device=device)
        self._host = torch.zeros(self._device.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        values = self._host.numpy()
        self._header = values[: COLUMNS * largest].reshape(COLUMNS, largest)
        self._table = values[COLUMNS * largest :].reshape(largest, pages)
        self._rows: list[tuple[int, ...]] = [()] * largest  # the table's, as the device has them
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def batch(self, size: int) -> Batch:
        """A batch of ``size`` rows over the device's buffer: whatever :meth:`fill` puts there."""
        edge = COLUMNS * self._largest
        tokens, positions, written, contexts = self._device[:edge].view(COLUMNS, self._largest)[:, :size]
        table = self._device[edge:].view(self._largest, self._pages)[:size]
        none, longest = self._device[:0], self._pages * self._page_tokens
        plan = CudaPlan(written, contexts, table, none.view(0, 0), none, none, none, self._page_tokens, longest, 0)
        return Batch(tokens, positions, torch.arange(size, device=self._device.device), plan)

    def fill(self, size: int, tokens: tuple[int, ...], spans: tuple[Span, ...]) -> None:
        """Copies a step's decodes to the device, padded to ``size`` rows. The host does not wait for the copy."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before has read the host's buffer
        rows, header, page_tokens = len(spans), self._header, self._page_tokens
        header[0, :rows] = tokens
        header[1, :rows] = [span.start for span in spans]
        header[2, :rows] = [
            span.pages[span.start // page_tokens] * page_tokens + span.start % page_tokens for span in spans
        ]
        header[3, :rows] = [span.start + 1 for span in spans]
        header[:, rows:size] = [[0], [0], [-1], [0]]
        used = COLUMNS * self._largest
        for row, span in enumerate(spans):
            if self._rows[row] != span.pages:  # most steps give most sequences no new page
                self._table[row, : len(span.pages)] = self._rows[row] = span.pages
                used = COLUMNS * self._largest + (row + 1) * self._pages
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class DecodeGraphs:
    """One rank's captured decode steps. All ranks of a replica capture and replay the same sizes in the same order."""

    def __init__(self, model: Model, cache: KVCache, largest: int) -> None:
        """For steps of at most ``largest`` decodes, of 512 if that is less."""
        largest = min(largest, LARGEST)
        self._model, self._cache = model, cache
        self._sizes = batch_sizes(largest)
        context = min(model.max_context, cache.layers[0].shape[0])  # tokens
        pages = -(-context // cache.page_tokens)
        self._inputs = Inputs(largest, pages + -pages % ALIGNED, cache.page_tokens, model.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None  # [largest, vocab], of all graphs

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Captures every size, the largest first, so that the others find room in its memory.

        ``progress(done, all)`` is called after each.
        """
        pool: Any = None
        for done, size in enumerate(reversed(self._sizes), 1):
            graph = self._captured(size, pool)
            pool = graph.pool()
            self._graphs[size] = graph
            progress(done, len(self._sizes))

    def _captured(self, size: int, pool: Any) -> torch.cuda.CUDAGraph:
        self._inputs.fill(size, (), ())
        batch = self._inputs.batch(size)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                logits = self._model.forward(batch, self._cache)
        torch.cuda.current_stream().wait_stream(aside)
        if self._logits is None:
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._logits[:size].copy_(self._model.forward(batch, self._cache))
        return graph

    def forward(self, step: Step) -> Tensor | None:
        """Logits [decodes, vocab], until the next call overwrites them; None for a step that no graph serves."""
        rows = len(step.spans)
        size = next((size for size in self._sizes if size >= rows), 0)
        if size not in self._graphs or step.decodes != rows or len(step.wanted) != rows:
            return None
        self._inputs.fill(size, step.tokens, step.spans)
        self._graphs[size].replay()
        assert self._logits is not None, "made by the first capture"
        return self._logits[:rows]
