"""The page allocator: which KV page belongs to whom. Pure bookkeeping; the bytes live in ``engine.cache``.

free ──take──► in use ──last drop──► free
                 ▲  └── last drop of a kept page ──► idle ──evicted by take──► free
                 └──────────────── share ────────────┘
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


class PageIntegrityError(AssertionError):
    """Reference counts, owners and the prefix cache disagree: a page leaked, is owned twice or is cached wrongly."""


class PagePool:
    """``pages`` pages of ``page_tokens`` tokens each, with a reference count per page.

    A page without references is free, or idle if it is kept: its content may be wanted again. Idle pages count as
    free: :meth:`take` gives them away, longest idle first, when no others are left, and tells ``on_evict`` of each.
    Pages are handed out in ascending order at first, later last freed first: what was used a moment ago is still in
    the CPU's caches.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        if pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool needs pages >= 1 and page_tokens >= 1, got {pages} and {page_tokens}")
        self.total = pages
        self.page_tokens = page_tokens
        self.high_water = 0
        self.on_evict: Callable[[int], None] | None = None
        self.changes = 0  # grows whenever a page changes hands
        self._free = list(range(pages - 1, -1, -1))
        self._used: set[int] = set()
        self._shared: dict[int, int] = {}  # references beyond the first, of the pages that have some
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first

    @property
    def free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return len(self._used)

    @property
    def kept(self) -> int:
        """Pages whose content outlives their references, those in use included."""
        return len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """``count`` free pages, each now referenced once. Raises :class:`OutOfPages`, all or nothing."""
        if count > self.free:
            raise OutOfPages(f"{count} pages wanted, {self.free} of {self.total} free")
        self.changes += 1
        while len(self._free) < count:
            self._evict()
        left = len(self._free) - count
        taken = self._free[left:]
        del self._free[left:]
        taken.reverse()
        self._used.update(taken)
        self.high_water = max(self.high_water, len(self._used))
        return taken

    def keep(self, page: int) -> None:
        """From now on ``page``, which must be in use, goes idle with its last reference instead of free."""
        if page not in self._used:
            raise PageIntegrityError(f"page {page} is free and cannot be kept")
        self.changes += 1
        self._kept.add(page)

    def share(self, pages: Iterable[int]) -> None:
        """Adds one reference to each of ``pages``, which must be in use or idle."""
        self.changes += 1
        for page in pages:
            if page in self._used:
                self._shared[page] = self._shared.get(page, 0) + 1
            elif page in self._kept:
                del self._idle[page]
                self._used.add(page)
            else:
                raise PageIntegrityError(f"page {page} is free and cannot be shared")
        self.high_water = max(self.high_water, len(self._used))

    def drop(self, pages: Iterable[int]) -> None:
        """Takes one reference from each of ``pages`` in turn; those without any left are free or idle."""
        self.changes += 1
        pages = list(pages)
        if self._kept.isdisjoint(pages) and self._shared.keys().isdisjoint(pages):  # most are: all go at once
            left = len(self._used) - len(pages)
            self._used.difference_update(pages)
            if len(self._used) != left:
                raise PageIntegrityError(f"of pages {pages} one is already free")
            self._free += pages
            return
        for page in pages:
            if page in self._shared:
                self._unshare(page)
                continue
            if page not in self._used:
                raise PageIntegrityError(f"page {page} is already free")
            self._used.remove(page)
            if page in self._kept:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _unshare(self, page: int) -> None:
        if self._shared[page] == 1:
            del self._shared[page]
        else:
            self._shared[page] -= 1

    def keep_none(self) -> None:
        """Nobody wants any page's content any longer: idle pages are free, those in use are when they are dropped."""
        self.changes += 1
        self._kept.clear()
        self._free += self._idle
        self._idle.clear()

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` are idle: sharing these takes from what is free."""
        return sum(page in self._idle for page in pages)

    def freed_by(self, owners: Iterable[Sequence[int]]) -> set[int]:
        """Pages that would be left without a reference if ``owners`` dropped all of theirs."""
        dropped = Counter(page for pages in owners for page in pages)
        return {page for page, count in dropped.items() if count == self._references(page)}

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raises :class:`PageIntegrityError` unless ``owners`` (everyone's pages) explain every reference exactly."""
        expected = Counter(page for pages in owners for page in pages)
        for page in range(self.total):
            if (references := self._references(page)) != expected[page]:
                raise PageIntegrityError(f"page {page} has {references} references but {expected[page]} owners")
        ownerless = {page for page in range(self.total) if expected[page] == 0}
        free = set(self._free)
        if len(free) != len(self._free) or free != ownerless - self._kept:
            raise PageIntegrityError("the free list is not exactly the pages without an owner that nobody keeps")
        if set(self._idle) != ownerless & self._kept:
            raise PageIntegrityError("the idle pages are not exactly the kept ones without an owner")

    def idle_in_order(self) -> tuple[int, ...]:
        """The idle pages in the order in which :meth:`take` would evict them."""
        return tuple(self._idle)

    def _references(self, page: int) -> int:
        return self._shared.get(page, 0) + (page in self._used)

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        self._free.append(page)
        if self.on_evict is not None:
            self.on_evict(page)
