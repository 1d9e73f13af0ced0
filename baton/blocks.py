"""Names for runs of tokens that every worker and router agree on, and the journal of which of them a cache holds. Pure.

A block is ``BLOCK_TOKENS`` tokens, named by a digest of them and of all before them, whatever the page size of whoever
holds their KV: a prefill pool with pages of 16 tokens and a decode pool with pages of 256 use the same names. A name is
a hint for routing and no more: two blocks of one name would cost time, never a wrong token.
"""

from __future__ import annotations

import array
import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from baton.messages import CacheEvents

BLOCK_TOKENS = 64
MAX_BLOCKS = 1 << 18  # in one record, and known of one worker: 16 million tokens, 2.4 MB
_NAME_BYTES = 8


class BlockChain:
    """Names the blocks of one sequence as its tokens come."""

    def __init__(self) -> None:
        self._last = bytes(_NAME_BYTES)
        self._rest: list[int] = []  # tokens of the block that is not yet full

    def extend(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Names of the blocks that ``tokens``, the next ones, fill."""
        self._rest += tokens
        if len(self._rest) < BLOCK_TOKENS:
            return ()
        full = len(self._rest) - len(self._rest) % BLOCK_TOKENS
        packed = memoryview(array.array("q", self._rest[:full])).cast("B")
        del self._rest[:full]
        size, names = BLOCK_TOKENS * 8, []
        for start in range(0, len(packed), size):
            self._last = hashlib.blake2b(self._last + packed[start : start + size], digest_size=_NAME_BYTES).digest()
            names.append(int.from_bytes(self._last, "little"))
        return tuple(names)


def block_names(tokens: Sequence[int]) -> tuple[int, ...]:
    """Names of the full blocks of ``tokens``."""
    return BlockChain().extend(tokens)


class BlockJournal:
    """Which blocks one worker's prefix cache holds, and what has changed since the last :meth:`take`.

    The engine's thread writes, the event loop reads. A change that is undone before it was taken is told all the same:
    who got a :meth:`snapshot` in between must hear of it.
    """

    def __init__(self, most: int = MAX_BLOCKS) -> None:
        """``most``: blocks in one record; of a cache that holds more, the rest stays unknown."""
        self._most = most
        self._gate = threading.Lock()  # held for as long as a copy of the names takes
        self._held: Counter[int] = Counter()  # pages in which the block ends: differing ones share it if pages are long
        self._changed: dict[int, bool] = {}  # block -> whether it is held now
        self._reset = False
        self._sequence = 0

    def change(self, blocks: Iterable[int], *, held: bool) -> None:
        """A page in which ``blocks`` end came into the cache or left it."""
        with self._gate:
            for block in blocks:
                before = self._held[block]
                self._held[block] += 1 if held else -1
                if not held and before == 1:
                    del self._held[block]
                if before == (0 if held else 1):
                    self._changed[block] = held
            if len(self._changed) > self._most:
                self._start_over()

    def clear(self) -> None:
        """The cache holds nothing any more."""
        with self._gate:
            self._held.clear()
            self._start_over()

    def take(self) -> CacheEvents | None:
        """What changed since the last call, for everybody who watches; None when nothing did."""
        with self._gate:
            if not self._changed and not self._reset:
                return None
            self._sequence += 1
            events = self._all() if self._reset else self._changes()
            self._changed, self._reset = {}, False
            return events

    def snapshot(self) -> CacheEvents:
        """All that is held now, for one who begins to watch; the next :meth:`take` follows it."""
        with self._gate:
            return self._all()

    def _start_over(self) -> None:
        self._changed, self._reset = {}, True

    def _changes(self) -> CacheEvents:
        added = tuple(block for block, held in self._changed.items() if held)
        removed = tuple(block for block, held in self._changed.items() if not held)
        return CacheEvents(self._sequence, False, added, removed)

    def _all(self) -> CacheEvents:
        return CacheEvents(self._sequence, True, tuple(self._held)[: self._most], ())
