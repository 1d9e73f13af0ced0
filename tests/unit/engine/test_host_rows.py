"""Copies between pages and tensors head by head, against torch's own indexing."""

from __future__ import annotations

import pytest
import torch

from engine import host_rows

PAGES = (5, 2, 9, 0, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "count", "page_tokens"), [(0, 20, 4), (3, 14, 4), (7, 1, 4), (5, 25, 6), (0, 0, 4)])
def test_head_by_head_is_what_torch_does(dtype: torch.dtype, start: int, count: int, page_tokens: int) -> None:
    slots = host_rows.slots_of(PAGES, start, count, page_tokens)
    want = [PAGES[token // page_tokens] * page_tokens + token % page_tokens for token in range(start, start + count)]
    assert slots.tolist() == want
    both = torch.randn(2, 3, count, 8).to(dtype)
    keys, values = both[0].transpose(0, 1), both[1].transpose(0, 1)  # strided, as codecs return them
    layer, twin = (torch.zeros(12 * page_tokens, 6, 8, dtype=dtype) for _ in range(2))
    host_rows.scatter(layer, slots, keys, values)
    twin[want] = torch.cat((keys, values), dim=1)
    assert torch.equal(layer, twin)
    again = host_rows.gather(layer, slots)
    assert torch.equal(again[0], keys)
    assert torch.equal(again[1], values)
    assert again[0].is_contiguous()
    layer.zero_()
    assert torch.equal(again[1], values)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (18, 3), (0, -1)])
def test_tokens_outside_the_pages_are_refused(start: int, count: int) -> None:
    with pytest.raises(IndexError, match="5 pages of 4"):
        host_rows.slots_of(PAGES, start, count, 4)
