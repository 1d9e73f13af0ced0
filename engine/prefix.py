"""The prefix cache: full KV pages by what they hold, kept after the requests that computed them. Pure bookkeeping.

A radix tree (SGLang, arXiv 2312.07104) whose every edge is one page. It is never walked: a page's key says what its own
tokens and all tokens before them are (:func:`chain`), so that a dictionary of keys is the tree, a path through it is a
sequence's block table, and a node's parent is the page before it.

A page is in use while a sequence holds it and idle afterwards. Sequences hold paths from the root and drop them deepest
page first. So an idle page's descendants are idle too and went idle no later than it did: the longest idle page is
always a leaf, and evicting in that order is exact LRU of leaves at O(1) a page.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from engine.pages import PageIntegrityError, PagePool

Key: TypeAlias = Hashable
KEY_BYTES = 16  # by accident two of 2^40 pages share a key with a chance of 2^-49; BLAKE2b resists intent too


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the page that holds ``tokens`` after the prefix that ``parent`` names: a salt before the first page.

    The salt must differ wherever equal tokens do not mean equal KV: another model or dtype.
    """
    return hashlib.blake2b(parent + array.array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class PageName(NamedTuple):
    """The key of a page of tokens, and the names of the blocks (``baton.blocks``) that end in it."""

    digest: bytes
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    key: Key
    parent: int | None  # the page before it


class PrefixCache:
    """What ``pool``'s kept pages hold. One thread.

    ``on_change`` is told of every key that comes or goes, and ``on_clear`` when they all go.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[Key, int] = {}
        self._entries: dict[int, _Entry] = {}
        self.on_change: Callable[[Key, bool], None] | None = None
        self.on_clear: Callable[[], None] | None = None
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._pages)

    def get(self, key: Key) -> int | None:
        """The page that holds what ``key`` names."""
        return self._pages.get(key)

    def match(self, keys: Sequence[Key], most: int) -> list[int]:
        """The pages of the longest cached prefix of ``keys``, at most ``most``. Takes no reference."""
        pages: list[int] = []
        for index in range(min(most, len(keys))):
            page = self._pages.get(keys[index])
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, key: Key, page: int, parent: int | None) -> None:
        """``page``, in use, holds what ``key`` names, and comes after the cached page ``parent``."""
        if key in self._pages or page in self._entries:
            raise PageIntegrityError(f"page {page} or its key is cached already")
        self._pool.keep(page)
        self._pages[key] = page
        self._entries[page] = _Entry(key, parent)
        if self.on_change is not None:
            self.on_change(key, True)

    def clear(self) -> None:
        """Nothing is cached any more."""
        self._pages.clear()
        self._entries.clear()
        self._pool.keep_none()
        if self.on_clear is not None:
            self.on_clear()

    def check_integrity(self, paths: Iterable[tuple[Sequence[Key], Sequence[int]]]) -> None:
        """Raises :class:`PageIntegrityError` unless the tree is whole.

        paths: the keys and pages of what each sequence has in the cache.
        """
        if len(self._pages) != len(self._entries) or len(self._entries) != self._pool.kept:
            raise PageIntegrityError(
                f"{len(self._pages)} keys, {len(self._entries)} pages cached, {self._pool.kept} kept"
            )
        place = {page: at for at, page in enumerate(self._pool.idle_in_order())}
        for page, entry in self._entries.items():
            if self._pages.get(entry.key) != page:
                raise PageIntegrityError(f"page {page} is not found under its key")
            if entry.parent is None:
                continue
            if entry.parent not in self._entries:
                raise PageIntegrityError(f"page {page} outlived page {entry.parent} before it")
            if place.get(entry.parent, len(place)) < place.get(page, len(place)):
                raise PageIntegrityError(f"page {entry.parent} would be evicted before page {page} after it")
        for keys, pages in paths:
            if [self._pages.get(key) for key in keys] != list(pages):
                raise PageIntegrityError(f"pages {list(pages)} are shared but not cached")

    def _forget(self, page: int) -> None:
        key = self._entries.pop(page).key
        del self._pages[key]
        if self.on_change is not None:
            self.on_change(key, False)
