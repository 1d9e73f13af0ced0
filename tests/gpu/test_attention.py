"""Paged attention at the sizes it is for, against its plain-torch twins; CUDA graphs over changing contexts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import paged_prefill

pytestmark = pytest.mark.gpu

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
# heads, kv_heads, head_dim, page_tokens, window
SHAPES = [
    (32, 8, 128, 16, None),
    (32, 8, 128, 64, 300),
    (9, 3, 64, 16, None),
    (8, 8, 96, 32, None),
    (16, 1, 256, 8, None),
    (28, 4, 128, 256, 1),
]
Shape = tuple[int, int, int, int, int | None]


def paged(shape: Shape, lengths: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A layer and its block table: shuffled pages, between slots of NaN that nobody may read."""
    _, kv_heads, head_dim, page_tokens, _ = shape
    wide = -(-max(lengths) // page_tokens) + 1
    table = torch.randperm(len(lengths) * wide, device=device).int().view(len(lengths), wide)
    layer = torch.full((table.numel() * page_tokens, 2 * kv_heads, head_dim), math.nan, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        tokens = torch.arange(length, device=device)
        at = table[row].long()[tokens // page_tokens] * page_tokens + tokens % page_tokens
        layer[at] = torch.randn(length, 2 * kv_heads, head_dim, device=device).to(dtype)
    return layer, table


def queries_of(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    heads, kv_heads, head_dim = shape[:3]
    return torch.randn(rows, heads + 2 * kv_heads, head_dim, device=device).to(dtype)[:, :heads]


def ints(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@DTYPES
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape: Shape, splits: int, dtype: torch.dtype, cuda: torch.device) -> None:
    torch.manual_seed(0)
    lengths = [2500, 0, 1, 777, 64, 65]
    layer, table = paged(shape, lengths, dtype, cuda)
    queries, contexts = queries_of(shape, len(lengths), dtype, cuda), ints(lengths, cuda)
    page_tokens, window, scale = shape[3], shape[4], shape[2] ** -0.5
    expected = reference_attention.paged_decode(
        queries, layer, table, contexts, page_tokens=page_tokens, scale=scale, window=window
    )
    got = paged_decode(
        queries, layer, table, contexts, page_tokens=page_tokens, scale=scale, window=window, splits=splits
    )
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(shape: Shape, dtype: torch.dtype, cuda: torch.device) -> None:
    torch.manual_seed(1)
    starts, counts, firsts = [0, 1000, 63, 5], [600, 257, 1, 64], [2, 602, 859, 860]
    layer, table = paged(shape, [start + count for start, count in zip(starts, counts, strict=True)], dtype, cuda)
    queries = queries_of(shape, 924, dtype, cuda)
    chunks = (ints(firsts, cuda), ints(starts, cuda), ints(counts, cuda))
    page_tokens, window, scale = shape[3], shape[4], shape[2] ** -0.5
    expected = reference_attention.paged_prefill(
        queries, layer, table, *chunks, page_tokens=page_tokens, scale=scale, window=window
    )
    out = torch.zeros_like(expected)
    paged_prefill(
        queries, layer, table, *chunks, longest=600, page_tokens=page_tokens, scale=scale, window=window, out=out
    )
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


def test_one_graph_serves_every_context(cuda: torch.device) -> None:
    torch.manual_seed(2)
    shape, dtype = SHAPES[0], torch.bfloat16
    layer, table = paged(shape, [2000, 2000, 2000], dtype, cuda)
    queries, contexts = queries_of(shape, 3, dtype, cuda), ints([5, 1, 9], cuda)
    splits = choose_splits(3, 8, 2000, torch.cuda.get_device_properties(cuda).multi_processor_count)
    out = torch.empty(3, 32, 128, dtype=dtype, device=cuda)

    def decode() -> None:
        paged_decode(queries, layer, table, contexts, page_tokens=16, scale=0.1, splits=splits, out=out)

    decode()  # compiles
    torch.cuda.synchronize(cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    for lengths in ([5, 1, 9], [2000, 0, 1000], [513, 1999, 64]):
        contexts.copy_(ints(lengths, cuda))
        graph.replay()
        expected = reference_attention.paged_decode(queries, layer, table, contexts, page_tokens=16, scale=0.1)
        torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


def test_slots_beyond_two_gigabytes(cuda: torch.device) -> None:
    """Offsets into a layer of over 2^31 elements."""
    page_tokens, row = 16, 2 * 8 * 128
    pages = (1 << 31) // (row * page_tokens) + 2
    layer = torch.zeros(pages * page_tokens, 16, 128, dtype=torch.bfloat16, device=cuda)
    layer[-page_tokens:] = 3.0
    table = ints([pages - 1], cuda)[None]
    queries = torch.randn(1, 32, 128, dtype=torch.bfloat16, device=cuda)
    got = paged_decode(queries, layer, table, ints([7], cuda), page_tokens=page_tokens, scale=0.1)
    assert (got == 3.0).all()
    chunk = (ints([0], cuda), ints([6], cuda), ints([1], cuda))
    got = paged_prefill(queries, layer, table, *chunk, longest=1, page_tokens=page_tokens, scale=0.1)
    assert (got == 3.0).all()
