"""Gather and scatter: copies of the right tokens, whatever the page size on either side."""

from __future__ import annotations

import pytest
import torch

from baton.layout import KVLayout
from engine.cache import KVCache

LAYOUT = KVLayout("m", layers=2, kv_heads=3, head_dim=4, dtype="float32")


def make(page_tokens: int, pages: int = 16, layout: KVLayout = LAYOUT) -> KVCache:
    return KVCache(layout, pages=pages, page_tokens=page_tokens, device=torch.device("cpu"))


def test_what_is_scattered_is_gathered_from_another_page_size() -> None:
    near, far = make(4), make(7)
    keys, values = torch.randn(18, 3, 4), torch.randn(18, 3, 4)
    near.scatter(1, (5, 2, 9, 0, 11), 2, keys, values)
    moved = near.gather(1, (5, 2, 9, 0, 11), 3, 17)
    far.scatter(0, (3, 1, 2), 1, *moved)
    again = far.gather(0, (3, 1, 2), 1, 17)
    assert torch.equal(again[0], keys[1:])
    assert torch.equal(again[1], values[1:])
    assert again[0].is_contiguous()
    assert again[1].is_contiguous()


def test_other_tokens_and_layers_stay_as_they_were() -> None:
    cache = make(4)
    cache.scatter(0, (1, 2), 3, torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    touched = cache.layers[0].abs().sum(dim=(1, 2)).nonzero().flatten().tolist()
    assert touched == [7, 8]
    assert cache.layers[1].abs().sum() == 0


def test_gather_returns_copies() -> None:
    cache = make(4)
    keys, _ = cache.gather(0, (0,), 0, 4)
    keys.fill_(1.0)
    assert cache.layers[0].abs().sum() == 0


def test_bfloat16_and_bytes() -> None:
    layout = KVLayout("m", layers=2, kv_heads=3, head_dim=4, dtype="bfloat16")
    cache = make(4, layout=layout)
    assert cache.bytes == 16 * 4 * layout.token_bytes
    assert cache.gather(0, (0,), 0, 1)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (7, 2), (0, 9)])
def test_tokens_outside_the_pages_are_refused(start: int, count: int) -> None:
    with pytest.raises(IndexError, match="outside 2 pages of 4"):
        make(4).gather(0, (0, 1), start, count)


def test_copied_pages_are_read_before_any_is_written() -> None:
    cache = make(4, pages=3)
    for layer in cache.layers:
        layer.copy_(torch.randn_like(layer))
    before = [layer.clone() for layer in cache.layers]
    cache.copy_pages((0, 1), (1, 2))
    for old, new in zip(before, cache.layers, strict=True):
        assert torch.equal(new[4:], old[:8])
        assert torch.equal(new[:4], old[:4])
    cache.copy_pages((), ())
