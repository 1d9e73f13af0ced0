from __future__ import annotations

import threading
import time

import pytest

from kvtransfer.arena import ALIGN, Arena, BufferPool, HostMemory, Region


def test_first_fit_returns_to_the_lowest_addresses():
    arena = Arena(10 * ALIGN)
    a, b, c = (arena.allocate(size) for size in (1, ALIGN + 1, ALIGN))
    assert [r.offset for r in (a, b, c)] == [0, ALIGN, 3 * ALIGN]
    arena.free(b)
    assert arena.allocate(3 * ALIGN).offset == 4 * ALIGN
    assert arena.allocate(2 * ALIGN) == b


def test_neighbours_merge_so_that_the_whole_comes_back():
    arena = Arena(4 * ALIGN)
    regions = [arena.allocate(ALIGN) for _ in range(4)]
    assert arena.allocate(1) is None
    for index in (0, 2, 1, 3):
        arena.free(regions[index])
    assert arena.allocate(4 * ALIGN) == Region(0, 4 * ALIGN)


def test_a_quarantined_region_is_not_handed_out_until_it_is_freed():
    arena = Arena(2 * ALIGN)
    region = arena.allocate(ALIGN)
    arena.quarantine(region)
    assert (arena.used_bytes, arena.quarantined_bytes) == (0, ALIGN)
    assert arena.allocate(2 * ALIGN) is None
    assert arena.allocate(ALIGN).offset == ALIGN
    arena.free(region)
    assert arena.quarantined_bytes == 0
    assert arena.allocate(ALIGN) == region


def test_misuse_is_an_error_and_changes_nothing():
    arena = Arena(2 * ALIGN)
    region = arena.allocate(2 * ALIGN)
    with pytest.raises(ValueError, match="shrink"):
        arena.shrink(region, 3 * ALIGN)
    small = arena.shrink(region, 1)
    for stale in (region, Region(ALIGN, ALIGN)):
        with pytest.raises(ValueError, match="not held"):
            arena.free(stale)
        with pytest.raises(ValueError, match="not in use"):
            arena.quarantine(stale)
    with pytest.raises(ValueError, match="0 bytes"):
        arena.allocate(0)
    arena.free(small)
    with pytest.raises(ValueError, match="not held"):
        arena.free(small)
    assert arena.used_bytes == 0


def test_memory_hands_out_only_what_it_has():
    memory = HostMemory(100)
    assert memory.address % 4096 == 0
    memory.view(90, 10)[:] = b"0123456789"
    assert bytes(memory.view(95, 5)) == b"56789"
    for offset, nbytes in ((91, 10), (-1, 2), (0, -1)):
        with pytest.raises(ValueError, match="outside"):
            memory.view(offset, nbytes)


def test_take_waits_for_a_region_that_is_given_back():
    pool = BufferPool(4096)
    region = pool.take(4096)
    assert pool.take(1) is None
    started = time.monotonic()
    assert pool.take(1, timeout_s=0.05) is None
    assert time.monotonic() - started >= 0.05
    giver = threading.Timer(0.05, pool.give, [region])
    giver.start()
    assert pool.take(1, timeout_s=5.0) == Region(0, ALIGN)
    giver.join()


def test_a_sweep_frees_only_what_has_ended():
    pool = BufferPool(4096)
    ended = {"a": False, "b": False}
    for name in ("a", "b"):
        pool.quarantine(pool.take(1024), lambda name=name: ended[name])
    pool.sweep()
    assert pool.stats().quarantined_bytes == 2048
    ended["a"] = True
    pool.sweep()
    assert pool.stats().quarantined_bytes == 1024
    ended["b"] = True
    pool.sweep()
    stats = pool.stats()
    assert (stats.used_bytes, stats.quarantined_bytes, stats.total_bytes) == (0, 0, 4096)
