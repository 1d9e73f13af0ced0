"""A decoder's operations on an NVIDIA GPU: Triton kernels around torch's products. The host waits for no step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.attention import Span
from engine.kernels import activation, norm, rope
from engine.kernels.paged_decode import choose_splits, contexts_of_all_kernels, paged_decode
from engine.kernels.paged_prefill import paged_prefill
from engine.ops import Linear

# int32 elements. Triton compiles a kernel again for a pointer or a stride that is not divisible by 16: with all of them
# aligned, no step meets a kernel that was not compiled before.
ALIGNED = 16
CPU_PROCESSORS = 4  # where kernels are interpreted: enough to split long contexts, as a GPU would


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """A step's block tables and lengths on the device: all int32, all parts of one copy.

    Rows that only pad a captured batch have ``written`` -1 and a context of 0.
    """

    written: Tensor  # [rows] where in the cache each row's own KV goes
    contexts: Tensor  # [decodes] tokens that each decode sees, itself included
    table: Tensor  # [decodes, pages]
    chunk_table: Tensor  # [chunks, pages]
    row_starts: Tensor  # [chunks] the step's row at which each begins, from the first chunk's on
    starts: Tensor  # [chunks] positions of their first tokens
    counts: Tensor  # [chunks]
    page_tokens: int
    longest_context: int  # of the decodes; at least the longest
    longest_chunk: int  # rows


class CudaOps:
    """As :class:`engine.ops.TorchOps`, whose rounding differs: here a kernel rounds once, when it stores."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        on_gpu = device.type == "cuda"
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else CPU_PROCESSORS

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        weight = weight.to(self._dtype)
        bias = None if bias is None else bias.to(self._dtype)
        return lambda x: linear(x, weight, bias)

    def norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.norm(hidden, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_norm(hidden, delta, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return activation.silu_mul(gate_up)

    def rope_write(self, plan: CudaPlan, qkv: Tensor, cos: Tensor, sin: Tensor, layer: Tensor) -> None:
        rope.rope_write(qkv, cos, sin, plan.written, layer)

    def plan(self, decodes: Sequence[Span], chunks: Sequence[Span], page_tokens: int) -> CudaPlan:
        """One copy to the device, from pinned memory, which the step's kernels wait for and the host does not."""
        wide, chunk_wide = _width(decodes), _width(chunks)
        written, contexts, table, chunk_table, row_starts, starts, counts = self._copied(
            _written((*decodes, *chunks), page_tokens),
            [span.start + 1 for span in decodes],
            _table(decodes, wide),
            _table(chunks, chunk_wide),
            _row_starts(chunks),
            [span.start for span in chunks],
            [span.count for span in chunks],
        )
        return CudaPlan(
            written,
            contexts,
            table.view(len(decodes), wide),
            chunk_table.view(len(chunks), chunk_wide),
            row_starts,
            starts,
            counts,
            page_tokens,
            max((span.start + 1 for span in decodes), default=0),
            max((span.count for span in chunks), default=0),
        )

    def _copied(self, *parts: list[int]) -> list[Tensor]:
        """Each part as an int32 tensor on the device, aligned."""
        flat: list[int] = []
        places = []
        for part in parts:
            places.append(slice(len(flat), len(flat) + len(part)))
            flat += part
            flat += [0] * (-len(flat) % ALIGNED)
        packed = torch.tensor(flat, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        packed = packed.to(self._device, non_blocking=True)
        return [packed[place] for place in places]

    def contexts_to_compile(self, kv_heads: int, longest: int) -> tuple[int, ...]:
        """As :func:`engine.kernels.paged_decode.contexts_of_all_kernels`, for this GPU."""
        return contexts_of_all_kernels(kv_heads, longest, self._processors)

    def attend(self, plan: CudaPlan, qkv: Tensor, layer: Tensor, window: int | None) -> Tensor:
        kv_heads, head_dim = layer.shape[1] // 2, layer.shape[2]
        queries = qkv[:, : -2 * kv_heads]
        rows, heads, _ = queries.shape
        out = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        decodes, scale = plan.contexts.shape[0], head_dim**-0.5
        if decodes:
            paged_decode(
                queries[:decodes],
                layer,
                plan.table,
                plan.contexts,
                page_tokens=plan.page_tokens,
                scale=scale,
                window=window,
                splits=choose_splits(decodes, kv_heads, plan.longest_context, self._processors),
                out=out[:decodes],
            )
        if plan.longest_chunk:
            paged_prefill(
                queries[decodes:],
                layer,
                plan.chunk_table,
                plan.row_starts,
                plan.starts,
                plan.counts,
                page_tokens=plan.page_tokens,
                scale=scale,
                window=window,
                longest=plan.longest_chunk,
                out=out[decodes:],
            )
        return out.flatten(1)


def _written(spans: Sequence[Span], page_tokens: int) -> list[int]:
    """Each row's slot, in the order of the step's rows."""
    return [
        span.pages[token // page_tokens] * page_tokens + token % page_tokens
        for span in spans
        for token in range(span.start, span.start + span.count)
    ]


def _width(spans: Sequence[Span]) -> int:
    """Pages of the longest block table, and a little more."""
    longest = max((len(span.pages) for span in spans), default=0)
    return longest + -longest % ALIGNED


def _table(spans: Sequence[Span], wide: int) -> list[int]:
    """Block tables of one width, one after the other; what pads them is never read."""
    return [page for span in spans for page in (*span.pages, *([0] * (wide - len(span.pages))))]


def _row_starts(chunks: Sequence[Span]) -> list[int]:
    starts, row = [], 0
    for span in chunks:
        starts.append(row)
        row += span.count
    return starts
