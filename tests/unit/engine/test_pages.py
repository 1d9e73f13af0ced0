"""The page allocator, page by page."""

from __future__ import annotations

import pytest

from engine.pages import OutOfPages, PageIntegrityError, PagePool


def test_takes_all_or_nothing() -> None:
    pool = PagePool(4, 16)
    assert pool.take(3) == [0, 1, 2]
    with pytest.raises(OutOfPages, match=r"2 pages wanted, 1 of 4 free"):
        pool.take(2)
    assert (pool.free, pool.used, pool.high_water) == (1, 3, 3)


def test_shared_page_is_free_after_its_last_owner() -> None:
    pool = PagePool(2, 16)
    pages = pool.take(1)
    pool.share(pages)
    pool.drop(pages)
    pool.check_integrity([pages])
    assert pool.used == 1
    pool.drop(pages)
    assert (pool.used, pool.high_water) == (0, 1)
    pool.check_integrity([])


def test_a_free_page_can_be_neither_dropped_nor_shared() -> None:
    pool = PagePool(2, 16)
    with pytest.raises(PageIntegrityError, match="already free"):
        pool.drop([1])
    with pytest.raises(PageIntegrityError, match="cannot be shared"):
        pool.share([1])


def test_kept_pages_go_idle_count_as_free_and_are_evicted_longest_idle_first() -> None:
    pool, evicted = PagePool(4, 16), []
    pool.on_evict = evicted.append
    first, second, third, plain = pool.take(4)
    for page in (first, second, third):
        pool.keep(page)
    pool.drop([second, plain, third, first])
    assert (pool.free, pool.used, pool.kept, pool.idle_in_order()) == (4, 0, 3, (second, third, first))
    pool.share([third])
    assert (pool.free, pool.used, pool.idle_among([first, second, third])) == (3, 1, 2)
    assert set(pool.take(2)) == {second, plain}
    pool.check_integrity([[third], [second], [plain]])
    assert evicted == [second]
    assert pool.take(1) == [first]
    assert (pool.free, pool.kept, evicted) == (0, 1, [second, first])


def test_an_unused_page_can_not_be_kept() -> None:
    with pytest.raises(PageIntegrityError, match="cannot be kept"):
        PagePool(2, 16).keep(1)


def test_pages_shared_by_others_are_not_freed() -> None:
    pool = PagePool(3, 16)
    pages = pool.take(3)
    pool.share(pages[:1])
    assert pool.freed_by([pages]) == set(pages[1:])
    assert pool.freed_by([pages, pages[:1]]) == set(pages)


def test_integrity_finds_an_idle_page_that_is_not_kept() -> None:
    pool = PagePool(2, 16)
    [page] = pool.take(1)
    pool.keep(page)
    pool.drop([page])
    pool.check_integrity([])
    pool._idle.clear()
    with pytest.raises(PageIntegrityError, match="idle pages"):
        pool.check_integrity([])


def test_pages_for_rounds_up() -> None:
    pool = PagePool(2, 16)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_integrity_finds_a_leak_a_double_owner_and_a_broken_free_list() -> None:
    pool = PagePool(3, 1)
    pages = pool.take(2)
    with pytest.raises(PageIntegrityError, match="1 references but 0 owners"):
        pool.check_integrity([pages[:1]])
    with pytest.raises(PageIntegrityError, match="1 references but 2 owners"):
        pool.check_integrity([pages, pages[:1]])
    pool._free.append(2)
    with pytest.raises(PageIntegrityError, match="free list"):
        pool.check_integrity([pages])


@pytest.mark.parametrize(("pages", "page_tokens"), [(0, 1), (1, 0)])
def test_empty_pools_are_refused(pages: int, page_tokens: int) -> None:
    with pytest.raises(ValueError, match="pages >= 1"):
        PagePool(pages, page_tokens)
