"""All-reduce between the ranks of one machine, through memory that they share.

Each rank has two slots and a counter. For round ``n`` a rank writes its summand to its slot ``n % 2``, sets its counter
to ``n``, waits until every counter is at least ``n`` and adds the slots up in the order of the ranks, so that all ranks
get the same bits. Two slots are enough: a rank's counter reaches ``n`` only after it has read everything of round
``n - 1``, so whoever saw all counters at ``n - 1`` may overwrite what was written in round ``n - 2``.

Counters are plain aligned 8-byte loads and stores, each on a cache line of its own. x86-64 makes stores visible in
program order and keeps loads in order (Intel SDM volume 3, 9.2.2), so a counter is never seen before the summand that
it announces; other processors promise less and are refused.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from baton.errors import ConfigError
from engine.comm import RankLost
from engine.devices import ORDERED_STORES

LINE_BYTES = 64
PIECE_BYTES = 256 << 10  # of one round: two ranks' slots stay in a core's second-level cache (docs/adr/0007)
ROUND_TIMEOUT_S = 10.0  # far above any difference between two ranks' work on a crowded machine
EAGER_POLLS = 400  # of the counters without a break, about 20 us
YIELDING_POLLS = 400  # with the core offered to whoever else wants it: ranks may outnumber cores
NAP_S = 50e-6
LONGEST_NAP_S = 1e-3
CHECK_PEERS_S = 0.02


def shared_bytes(ranks: int) -> int:
    """How much shared memory :class:`SharedReduce` needs."""
    return ranks * (LINE_BYTES + 2 * PIECE_BYTES)


class SharedReduce:
    """One rank's end. ``memory`` holds at least ``shared_bytes(ranks)`` bytes, zero at first, and is used by nothing
    else. Every rank must make the same calls with the same shapes in the same order.

    ``check_peers`` is called every ``CHECK_PEERS_S`` of a wait and raises when it knows that a peer has died; without
    it a death is found by the timeout, as a stopped rank is.
    """

    def __init__(
        self,
        memory: mmap.mmap,
        *,
        rank: int,
        ranks: int,
        check_peers: Callable[[], None] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if platform.machine() not in ORDERED_STORES:
            raise ConfigError(f"needs x86-64 on CPU, this is {platform.machine()}", field="tensor_parallel")
        self.rank, self.ranks, self.device = rank, ranks, torch.device("cpu")
        self._check_peers, self._timeout_s = check_peers, timeout_s or ROUND_TIMEOUT_S
        lines = ranks * LINE_BYTES
        self._counters = memoryview(memory)[:lines].cast("q")
        self._peers = [(peer, peer * LINE_BYTES // 8) for peer in range(ranks) if peer != rank]
        self._own = rank * LINE_BYTES // 8
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=lines, count=ranks * 2 * PIECE_BYTES)
        self._slots = slots.view(ranks, 2, PIECE_BYTES)
        self._typed: dict[torch.dtype, list[list[Tensor]]] = {}  # [2][ranks] slots as that dtype
        self._round = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, of any shape, in ``x`` itself when its memory is contiguous."""
        x = x.contiguous()
        flat, slots = x.view(-1), self._slots_of(x.dtype)
        piece = PIECE_BYTES // x.element_size()
        if flat.shape[0] <= piece:
            self._reduce(flat, slots)
        else:
            for part in torch.split(flat, piece):
                self._reduce(part, slots)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """On rank 0 every rank's ``x`` [rows, n] side by side: [rows, ranks * n]. On the other ranks ``x`` itself."""
        x = x.contiguous()
        rows, width = x.shape
        out = x.new_empty(rows, self.ranks, width) if self.rank == 0 else None
        if out is not None:
            out[:, 0] = x
        piece = PIECE_BYTES // x.element_size()
        columns = min(width, piece)
        step = max(1, piece // columns)
        for row in range(0, rows, step):
            for column in range(0, width, columns):
                rows_here, columns_here = slice(row, row + step), slice(column, column + columns)
                self._gather(x[rows_here, columns_here], out if out is None else out[rows_here, :, columns_here])
        return x if out is None else out.view(rows, self.ranks * width)

    def settle(self) -> None:
        """Nothing to wait for: a sum is done when its call returns."""

    def _reduce(self, x: Tensor, slots: list[list[Tensor]]) -> None:
        """x: [n], at most one piece."""
        count, turn = x.shape[0], self._begin()
        mine = slots[turn]
        mine[self.rank][:count].copy_(x)
        self._publish()
        self._await(self._round)
        if self.ranks == 2:
            x.add_(mine[1 - self.rank][:count])  # a sum of two is the same in either order
            return
        torch.add(mine[0][:count], mine[1][:count], out=x)
        for peer in range(2, self.ranks):
            x.add_(mine[peer][:count])

    def _gather(self, x: Tensor, out: Tensor | None) -> None:
        """x: [rows, columns], at most one piece; out: [rows, ranks, columns] on rank 0."""
        turn = self._begin()
        slots, count = self._slots_of(x.dtype)[turn], x.numel()
        if out is None:
            slots[self.rank][:count].view(x.shape).copy_(x)
            self._publish()
            return
        self._publish()
        self._await(self._round)
        for peer, _ in self._peers:
            out[:, peer] = slots[peer][:count].view(x.shape)

    def _begin(self) -> int:
        """Opens the next round and returns whose turn it is of the two slots: this rank may write its own."""
        self._await(self._round)  # an all-reduce has waited already, the sender of a gather has not
        self._round += 1
        return self._round % 2

    def _publish(self) -> None:
        self._counters[self._own] = self._round

    def _await(self, number: int) -> None:
        """Returns when every rank has published round ``number``; raises :class:`RankLost` for one that does not."""
        counters = self._counters
        for peer, index in self._peers:
            polls = 0
            while counters[index] < number:
                polls += 1
                if polls > EAGER_POLLS:
                    self._await_slowly(peer, index, number)
                    break

    def _await_slowly(self, peer: int, index: int, number: int) -> None:
        counters = self._counters
        for _ in range(YIELDING_POLLS):
            if counters[index] >= number:
                return
            os.sched_yield()
        started_s = checked_s = time.monotonic()
        nap_s = NAP_S
        while counters[index] < number:
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, LONGEST_NAP_S)
            now_s = time.monotonic()
            if self._check_peers is not None and now_s - checked_s > CHECK_PEERS_S:
                self._check_peers()
                checked_s = now_s
            if now_s - started_s > self._timeout_s:
                behind = number - counters[index]
                raise RankLost(peer, f"{behind} rounds behind for {self._timeout_s:g} s")

    def _slots_of(self, dtype: torch.dtype) -> list[list[Tensor]]:
        if dtype not in self._typed:
            self._typed[dtype] = [
                [self._slots[rank, turn].view(dtype) for rank in range(self.ranks)] for turn in (0, 1)
            ]
        return self._typed[dtype]


def create_shared(size: int) -> int:
    """A file descriptor of ``size`` zero bytes in memory without a name: gone with the last process that holds it."""
    descriptor = os.memfd_create("baton-ranks", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def map_shared(descriptor: int) -> mmap.mmap:
    """The whole of a :func:`create_shared` file as this process's memory. The descriptor is free to be closed."""
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size)
