"""The page allocator: which KV page belongs to whom. Pure bookkeeping; the bytes live in ``engine.cache``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


class PageIntegrityError(AssertionError):
    """Reference counts and owners disagree: a page leaked or is owned twice."""


class PagePool:
    """``pages`` pages of ``page_tokens`` tokens each, with a reference count per page.

    A page is free while its count is zero. Pages are handed out in ascending order at first, later last freed first:
    what was used a moment ago is still in the CPU's caches.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        if pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool needs pages >= 1 and page_tokens >= 1, got {pages} and {page_tokens}")
        self.total = pages
        self.page_tokens = page_tokens
        self.high_water = 0
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """``count`` free pages, each now referenced once. Raises :class:`OutOfPages`, all or nothing."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} of {self.total} free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        self.high_water = max(self.high_water, self.used)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Adds one reference to each of ``pages``, which must be in use."""
        for page in pages:
            if self._references[page] == 0:
                raise PageIntegrityError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Takes one reference from each of ``pages``; those without any left are free."""
        for page in pages:
            if self._references[page] == 0:
                raise PageIntegrityError(f"page {page} is already free")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raises :class:`PageIntegrityError` unless ``owners`` (everyone's pages) explain every reference exactly."""
        expected = Counter(page for pages in owners for page in pages)
        for page, references in enumerate(self._references):
            if references != expected[page]:
                raise PageIntegrityError(f"page {page} has {references} references but {expected[page]} owners")
        free = set(self._free)
        if len(free) != len(self._free) or free != {page for page in range(self.total) if expected[page] == 0}:
            raise PageIntegrityError("the free list is not exactly the pages without an owner")
