"""Who holds which pages: sequences get theirs here, from the prefix cache first, and give them back. Pure."""

from __future__ import annotations

from collections.abc import Collection

from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.sequence import Sequence


class Holdings:
    """Every page reference belongs to a sequence that came through here. A page that is shared is never written."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.cache = PrefixCache(pool)
        self.entered_tokens = 0  # known when their sequence got its pages
        self.hit_tokens = 0  # of these, found in the cache and not computed again

    def fits(self, sequence: Sequence, victims: Collection[Sequence] = ()) -> bool:
        """Whether there would be pages for all known tokens of ``sequence`` if ``victims`` had given theirs back."""
        shared, _ = self._hits(sequence)
        gone = self.pool.freed_by(victim.pages for victim in victims) if victims else set[int]()
        fresh = self.pool.pages_for(sequence.known) - len(shared)
        return fresh + self.pool.idle_among(shared) + len(gone.intersection(shared)) <= self.pool.free + len(gone)

    def found(self, sequence: Sequence) -> int:
        """Tokens of ``sequence`` that it would not have to compute if it entered now."""
        shared, source = self._hits(sequence)
        return len(shared) * self.pool.page_tokens if source is None else sequence.known - 1

    def enter(self, sequence: Sequence) -> None:
        """Gives ``sequence``, which must fit, the pages of its known tokens; those from the cache count as computed.

        At least one token is left to compute, for its logits. When the cache holds them all, that last token's page is
        copied (:attr:`engine.sequence.Slice.copy`), because computing it writes its KV. The page that it is copied from
        may be evicted in this very step, even to become the copy.
        """
        shared, source = self._hits(sequence)
        self.pool.share(shared)
        taken = self.pool.take(self.pool.pages_for(sequence.known) - len(shared))
        sequence.pages, sequence.published = [*shared, *taken], len(shared)
        sequence.computed = len(shared) * self.pool.page_tokens
        if source is not None:
            sequence.computed = sequence.known - 1
            sequence.copy = (source, taken[0]) if source != taken[0] else None
        sequence.cached = sequence.computed
        self.entered_tokens += sequence.known
        self.hit_tokens += sequence.computed

    def adopt(self, sequence: Sequence) -> None:
        """Swaps the pages that ``sequence`` would compute next for those that others have published meanwhile."""
        page_tokens = self.pool.page_tokens
        while (
            sequence.computed == sequence.published * page_tokens and sequence.computed + page_tokens < sequence.known
        ):
            index = sequence.published
            page = self.cache.get(sequence.keys[index]) if index < len(sequence.keys) else None
            if page is None:
                return
            self._swap(sequence, index, page)
            sequence.published += 1
            sequence.computed += page_tokens
            sequence.cached += page_tokens
            self.hit_tokens += page_tokens

    def publish(self, sequence: Sequence) -> None:
        """Puts the pages of ``sequence`` that are full and named into the cache.

        Where another sequence has published the same meanwhile, ``sequence`` takes that page for its own. It cannot if
        others may be reading its pages; then it publishes no more, so that whoever holds a page holds those before it.
        """
        full = min(sequence.computed // self.pool.page_tokens, len(sequence.keys))
        while sequence.publishes and sequence.published < full:
            index = sequence.published
            page = self.cache.get(sequence.keys[index])
            if page is None:
                parent = sequence.pages[index - 1] if index else None
                self.cache.publish(sequence.keys[index], sequence.pages[index], parent)
            elif sequence.preemptible:
                self._swap(sequence, index, page)
            else:
                sequence.publishes = False
                return
            sequence.published += 1

    def leave(self, sequence: Sequence) -> None:
        """Takes the pages back; what was computed has to be computed again, or found in the cache."""
        self.pool.drop(reversed(sequence.pages))  # deepest first, as engine.prefix relies on
        sequence.pages, sequence.computed, sequence.published = [], 0, 0
        sequence.cached, sequence.copy, sequence.publishes = 0, None, True

    def distrust(self, sequences: Collection[Sequence]) -> None:
        """Empties the cache, and keeps what ``sequences`` (all there are) have computed so far out of it."""
        self.cache.clear()
        for sequence in sequences:
            sequence.published, sequence.publishes = 0, False

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Raises :class:`engine.pages.PageIntegrityError` unless sequences and cache explain every page."""
        self.pool.check_integrity(sequence.pages for sequence in sequences)
        self.cache.check_integrity((s.keys[: s.published], s.pages[: s.published]) for s in sequences)

    def _hits(self, sequence: Sequence) -> tuple[list[int], int | None]:
        """Cached pages that ``sequence`` can share, and the one to copy when they hold every known token."""
        full, rest = divmod(sequence.known, self.pool.page_tokens)
        pages = self.cache.match(sequence.keys, full)
        if rest or len(pages) < full:
            return pages, None
        return pages[:-1], pages[-1]

    def _swap(self, sequence: Sequence, index: int, page: int) -> None:
        self.pool.share((page,))
        self.pool.drop((sequence.pages[index],))
        sequence.pages[index] = page
