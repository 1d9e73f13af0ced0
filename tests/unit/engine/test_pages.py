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
