"""Who holds which prefix, as far as workers have told: blocks of tokens (``baton.blocks``) by name. Pure.

A name stands for its block and all before it, so a dictionary of names is the radix tree of all workers' caches at
once; each name has a bit for every worker that holds it. Matching a prompt is one walk down its names, however many
workers there are.

Everything here is a hint. A worker whose changes were missed, or who has not told yet, is unknown rather than empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.blocks import BLOCK_TOKENS, MAX_BLOCKS
from baton.messages import CacheEvents

EXPECTED_S = 10.0  # how long a prompt that was sent somewhere counts as held there, until the worker tells
MAX_EXPECTED = 1 << 14  # prompts that count as held; the oldest make room


@dataclass(slots=True)
class _Worker:
    bit: int
    sequence: int
    held: set[int] = field(default_factory=set)
    expected: dict[int, float] = field(default_factory=dict)  # block -> until when; none of them is in ``held``


class PrefixIndex:
    """At most ``most`` blocks of each worker; what comes beyond is not known to be held."""

    def __init__(self, *, block_tokens: int = BLOCK_TOKENS, most: int = MAX_BLOCKS) -> None:
        self._block_tokens, self._most = block_tokens, most
        self._workers: dict[str, _Worker] = {}
        self._holders: dict[int, int] = {}  # block -> bits of the workers
        self._expiring: deque[tuple[float, str, tuple[int, ...]]] = deque()

    def __len__(self) -> int:
        """Blocks that somebody holds or is expected to."""
        return len(self._holders)

    def apply(self, worker: str, events: CacheEvents) -> bool:
        """What ``worker`` told. False: something before it was missed, and the worker is unknown until a reset."""
        if events.reset:
            self.forget(worker)
            self._workers[worker] = _Worker(self._free_bit(), events.sequence)
        known = self._workers.get(worker)
        if known is None:
            return False
        if not events.reset and events.sequence != known.sequence + 1:
            self.forget(worker)
            return False
        known.sequence = events.sequence
        for block in events.removed:
            if block in known.held:
                known.held.remove(block)
                self._unmark(block, known.bit)
        for block in events.added:
            if len(known.held) < self._most:
                known.expected.pop(block, None)
                known.held.add(block)
                self._mark(block, known.bit)
        return True

    def forget(self, worker: str) -> None:
        """``worker`` is gone, or what it holds is not known any more."""
        known = self._workers.pop(worker, None)
        if known is not None:
            for block in (*known.held, *known.expected):
                self._unmark(block, known.bit)

    def expect(self, worker: str, blocks: Sequence[int], now_s: float) -> None:
        """A prompt of ``blocks`` was sent to ``worker``: whoever comes soon after finds it there, before it tells."""
        known = self._workers.get(worker)
        if known is None:
            return
        room, until_s = self._most - len(known.expected), now_s + EXPECTED_S
        fresh = tuple(block for block in blocks if block not in known.held)[:room]
        for block in fresh:
            known.expected[block] = until_s
            self._mark(block, known.bit)
        if fresh:
            self._expiring.append((until_s, worker, fresh))
        self._expire(now_s)

    def match(self, blocks: Iterable[int], now_s: float) -> dict[str, int]:
        """How many tokens each worker holds of a prompt of these ``blocks``. Unknown workers are not in it."""
        self._expire(now_s)
        holding, depth = -1, 0
        ends: list[tuple[int, int]] = []  # bits of workers, and how many blocks they hold
        for block in blocks:
            left = holding & self._holders.get(block, 0)
            if left != holding:
                ends.append((holding & ~left, depth))
            holding = left
            if not holding:
                break
            depth += 1
        ends.append((holding, depth))
        return {
            name: self._block_tokens * next(depth for bits, depth in ends if bits & worker.bit)
            for name, worker in self._workers.items()
        }

    def _expire(self, now_s: float) -> None:
        while self._expiring and (self._expiring[0][0] <= now_s or len(self._expiring) > MAX_EXPECTED):
            until_s, worker, blocks = self._expiring.popleft()
            known = self._workers.get(worker)
            if known is None:
                continue
            for block in blocks:
                if known.expected.get(block) == until_s:
                    del known.expected[block]
                    self._unmark(block, known.bit)

    def _mark(self, block: int, bit: int) -> None:
        self._holders[block] = self._holders.get(block, 0) | bit

    def _unmark(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _free_bit(self) -> int:
        used = sum(worker.bit for worker in self._workers.values())
        return ~used & (used + 1)  # the lowest that nobody has
