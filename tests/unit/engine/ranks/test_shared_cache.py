"""All ranks' caches as one: whole heads in order, whatever the ranks."""

from __future__ import annotations

import mmap

import pytest
import torch

from baton.layout import KVLayout
from engine.cache import KVCache
from engine.shared_cache import Segment, SharedKVCache
from engine.shared_reduce import SharedReduce

PAGES, PAGE = 6, 4


def layout(dtype: str) -> KVLayout:
    return KVLayout("model", layers=2, kv_heads=6, head_dim=8, dtype=dtype)  # type: ignore[arg-type]


def shared(dtype: str, ranks: int) -> tuple[SharedKVCache, Segment, mmap.mmap]:
    segment = Segment(layout(dtype), ranks, PAGES, PAGE)
    memory = mmap.mmap(-1, segment.bytes)
    return SharedKVCache(segment, memory), segment, memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_what_is_scattered_is_gathered_and_equals_one_ranks_cache(dtype: str, ranks: int) -> None:
    cache, _, _ = shared(dtype, ranks)
    plain = KVCache(layout(dtype), pages=PAGES, page_tokens=PAGE, device=torch.device("cpu"))
    assert cache.bytes == plain.bytes
    pages, generator = (4, 0, 3), torch.Generator().manual_seed(ranks)
    for layer in range(2):
        keys, values = (torch.randn(7, 6, 8, generator=generator) for _ in range(2))
        for one in (cache, plain):
            one.scatter(layer, pages, 3, keys, values)
    for layer in range(2):
        for start, count in [(0, 12), (3, 7), (5, 1)]:
            got, expected = cache.gather(layer, pages, start, count), plain.gather(layer, pages, start, count)
            assert all(torch.equal(*pair) and pair[0].is_contiguous() for pair in zip(got, expected, strict=True))


def test_a_rank_holds_its_own_heads() -> None:
    cache, segment, memory = shared("float32", 3)
    keys = torch.arange(6.0)[None, :, None].expand(1, 6, 8)  # the value is the head's number
    cache.scatter(1, (2,), 1, keys, keys + 10)
    for rank in range(3):
        own = segment.cache(memory, rank).layers[1][2 * PAGE + 1]  # [2 * kv_heads / ranks, head_dim]
        first = 2.0 * rank
        assert own[:, 0].tolist() == [first, first + 1, first + 10, first + 11]
        assert segment.cache(memory, rank).layers[0].count_nonzero() == 0


def test_sums_and_caches_do_not_touch_each_other() -> None:
    cache, _, memory = shared("bfloat16", 2)
    comm = SharedReduce(memory, rank=0, ranks=2)
    for shard in cache.shards:
        for layer in shard.layers:
            layer.fill_(1.0)
    assert comm._slots.count_nonzero() == 0
    comm._slots.fill_(255)
    assert all(bool((layer == 1.0).all()) for shard in cache.shards for layer in shard.layers)
