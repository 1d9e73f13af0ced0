"""Paged attention against its plain-torch twins: page sizes, shared KV heads, dtypes, windows, splits, odd strides."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.paged_decode import MAX_SPLITS, choose_splits, paged_decode, workspace_elements
from engine.kernels.paged_prefill import paged_prefill

# One rounding of the result, and in bfloat16 of the softmax's weights too; the interpreter truncates to bfloat16.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype = torch.float32
    window: int | None = None


SHAPES = [
    Shape(2, 2, 16, 8),
    Shape(3, 1, 16, 16, torch.bfloat16),
    Shape(9, 3, 16, 16, window=5),
    Shape(4, 2, 24, 8, torch.float16),  # a head size that is no power of two
    Shape(16, 1, 32, 32, torch.bfloat16, 20),
    Shape(8, 2, 64, 64),
    Shape(2, 1, 16, 256, window=1),
]


class Paged:
    """Sequences of random keys and values in shuffled pages, between slots of NaN that nobody may read."""

    def __init__(self, shape: Shape, lengths: list[int], device: torch.device) -> None:
        wide = max(1, -(-max(lengths) // shape.page_tokens)) + 1
        order = torch.randperm(len(lengths) * wide).int()
        self.table = order.view(len(lengths), wide).to(device)
        slots = order.numel() * shape.page_tokens
        self.layer = torch.full((slots, 2 * shape.kv_heads, shape.head_dim), math.nan, dtype=shape.dtype, device=device)
        for row, length in enumerate(lengths):
            tokens = torch.arange(length, device=device)
            at = self.table[row].long()[tokens // shape.page_tokens] * shape.page_tokens + tokens % shape.page_tokens
            self.layer[at] = torch.randn(length, *self.layer.shape[1:], device=device).to(shape.dtype)


def queries_of(shape: Shape, rows: int, device: torch.device) -> Tensor:
    """Queries as they lie in a step: between the keys and values of their rows, [rows, heads, head_dim]."""
    qkv = torch.randn(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim, device=device).to(shape.dtype)
    return qkv[:, : shape.heads]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape: Shape, splits: int, device: torch.device) -> None:
    torch.manual_seed(0)
    lengths = [random.Random(f"{shape}{splits}").randint(2, 80), 0, 1, shape.page_tokens]
    paged = Paged(shape, lengths, device)
    queries = queries_of(shape, len(lengths), device)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)
    scale = shape.head_dim**-0.5
    fixed: dict[str, Any] = {"page_tokens": shape.page_tokens, "scale": scale, "window": shape.window}
    elements = workspace_elements(len(lengths), shape.heads, shape.head_dim, splits)
    workspace = torch.full((elements,), math.nan, device=device)
    expected = reference_attention.paged_decode(queries, paged.layer, paged.table, contexts, **fixed)
    got = paged_decode(
        queries, paged.layer, paged.table, contexts, splits=splits, workspace=workspace, **fixed
    )  # fmt: skip
    torch.testing.assert_close(got, expected, **TOLERANCE[shape.dtype])
    assert not got[1].any()  # the row that pads the batch


def test_splits_agree_and_fill_the_rows_they_are_given(device: torch.device) -> None:
    torch.manual_seed(1)
    shape = Shape(4, 2, 16, 8)
    paged = Paged(shape, [70, 33], device)
    contexts = torch.tensor([70, 33], dtype=torch.int32, device=device)
    queries = queries_of(shape, 2, device)
    whole = torch.full((5, 4, 16), 7.0, device=device)
    for splits in (1, 2, 6):  # 6 splits of 5 blocks: some find nothing to do
        out = whole[1:3]
        got = paged_decode(
            queries, paged.layer, paged.table, contexts, page_tokens=8, scale=0.3, splits=splits, out=out
        )  # fmt: skip
        expected = reference_attention.paged_decode(
            queries, paged.layer, paged.table, contexts, page_tokens=8, scale=0.3
        )  # fmt: skip
        assert got is out
        torch.testing.assert_close(out, expected)
        assert (whole[[0, 3, 4]] == 7.0).all()
        out.fill_(7.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(shape: Shape, device: torch.device) -> None:
    torch.manual_seed(2)
    draw = random.Random(str(shape))
    starts = [draw.randint(1, 40), 0, draw.randint(0, 40), shape.page_tokens]
    counts = [draw.randint(1, 9), draw.randint(1, 20), 1, 3]
    row_starts = [1, 1 + counts[0], 1 + counts[0] + counts[1], 2 + counts[0] + counts[1]]  # row 0 is another's
    paged = Paged(shape, [start + count for start, count in zip(starts, counts, strict=True)], device)
    queries = queries_of(shape, 1 + sum(counts), device)
    chunks = tuple(torch.tensor(each, dtype=torch.int32, device=device) for each in (row_starts, starts, counts))
    fixed: dict[str, Any] = {"page_tokens": shape.page_tokens, "scale": shape.head_dim**-0.5, "window": shape.window}
    expected = reference_attention.paged_prefill(queries, paged.layer, paged.table, *chunks, **fixed)
    out = torch.zeros_like(expected)
    got = paged_prefill(queries, paged.layer, paged.table, *chunks, longest=max(counts), out=out, **fixed)
    assert got is out
    assert not got[0].any()
    torch.testing.assert_close(got, expected, **TOLERANCE[shape.dtype])


def test_a_prefill_of_one_token_is_a_decode(device: torch.device) -> None:
    torch.manual_seed(3)
    shape = Shape(6, 3, 16, 16)
    paged = Paged(shape, [35], device)
    queries = queries_of(shape, 1, device)
    first, start, count = (torch.tensor([each], dtype=torch.int32, device=device) for each in (0, 34, 1))
    fixed: dict[str, Any] = {"page_tokens": 16, "scale": 0.25}
    prefilled = paged_prefill(queries, paged.layer, paged.table, first, start, count, longest=1, **fixed)
    decoded = paged_decode(queries, paged.layer, paged.table, start + 1, splits=2, **fixed)
    torch.testing.assert_close(prefilled, decoded)


def test_nothing_to_do(device: torch.device) -> None:
    shape = Shape(2, 1, 16, 8)
    paged, empty = Paged(shape, [3], device), torch.empty(0, dtype=torch.int32, device=device)
    queries = queries_of(shape, 0, device)
    assert paged_decode(queries, paged.layer, paged.table[:0], empty, page_tokens=8, scale=1.0).shape == (0, 2, 16)
    chunks = (empty, empty, empty)
    got = paged_prefill(queries, paged.layer, paged.table[:0], *chunks, longest=0, page_tokens=8, scale=1.0)
    assert got.shape == (0, 2, 16)


def test_twins_attend_as_torch_does() -> None:
    """The twins themselves against SDPA, where pages are in order and nothing is cut off."""
    torch.manual_seed(4)
    shape = Shape(4, 2, 16, 8)
    layer = torch.randn(24, 4, 16)
    table = torch.arange(3, dtype=torch.int32)[None]
    queries = queries_of(shape, 24, torch.device("cpu"))
    keys, values = (half.transpose(0, 1).repeat_interleave(2, dim=0) for half in layer.chunk(2, dim=1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1), keys, values, is_causal=True, scale=0.5
    ).transpose(0, 1)
    chunk = (torch.tensor([0]), torch.tensor([0]), torch.tensor([24]))
    got = reference_attention.paged_prefill(queries, layer, table, *chunk, page_tokens=8, scale=0.5)
    torch.testing.assert_close(got, expected)
    last = reference_attention.paged_decode(
        queries[-1:], layer, table, torch.tensor([24]), page_tokens=8, scale=0.5
    )  # fmt: skip
    torch.testing.assert_close(last, expected[-1:])


def test_choose_splits() -> None:
    assert choose_splits(1, 8, 100, 132) == 1  # too short to share
    assert choose_splits(1, 8, 32_768, 132) == MAX_SPLITS
    assert choose_splits(4096, 8, 32_768, 132) == 1  # the batch fills the GPU
    for sequences in (1, 2, 16, 64, 256):
        for context in (1, 1024, 32_768):
            splits = choose_splits(sequences, 8, context, 132)
            assert 1 <= splits <= MAX_SPLITS
            assert splits == 1 or context / splits > 128
            assert splits <= choose_splits(sequences, 8, 2 * context, 132)
            assert splits >= choose_splits(2 * sequences, 8, context, 132)
