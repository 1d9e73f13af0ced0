"""Bounded host memory for encoded KV: a pure first-fit allocator, the memory, and a pool that threads share.

First fit hands out the lowest addresses again and again, so that only the pages really needed become resident.
A *quarantined* region is one that an aborted transfer may still write: it counts apart and is not handed out until the
transfer is known to have ended (docs/adr/0003-landing-buffers.md).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ALIGN = 64  # a cache line, and more than any codec's integers need
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Region:
    offset: int
    nbytes: int  # rounded up to ALIGN


class Arena:
    """Offsets only, no memory and no locks. Every region is free, used or quarantined."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes // ALIGN * ALIGN
        self.used_bytes = 0
        self.quarantined_bytes = 0
        self._free: list[tuple[int, int]] = [(0, self.total_bytes)] if self.total_bytes else []  # sorted (offset, size)
        self._held: dict[int, tuple[int, bool]] = {}  # offset -> (size, quarantined)

    def allocate(self, nbytes: int) -> Region | None:
        """At least ``nbytes`` in one piece, or None when no gap is large enough."""
        size = _round_up(nbytes)
        for index, (offset, gap) in enumerate(self._free):
            if gap >= size:
                self._free[index : index + 1] = [(offset + size, gap - size)] if gap > size else []
                self._held[offset] = (size, False)
                self.used_bytes += size
                return Region(offset, size)
        return None

    def shrink(self, region: Region, nbytes: int) -> Region:
        """Keeps the first ``nbytes`` of ``region`` and frees the rest."""
        size = _round_up(nbytes)
        if size > region.nbytes or self._held.get(region.offset) != (region.nbytes, False):
            raise ValueError(f"cannot shrink {region} to {nbytes} bytes")
        if size < region.nbytes:
            self._held[region.offset] = (size, False)
            self.used_bytes -= region.nbytes - size
            self._return(region.offset + size, region.nbytes - size)
        return Region(region.offset, size)

    def quarantine(self, region: Region) -> None:
        """Keeps ``region`` from being handed out although its owner is done with it."""
        if self._held.get(region.offset) != (region.nbytes, False):
            raise ValueError(f"{region} is not in use")
        self._held[region.offset] = (region.nbytes, True)
        self.used_bytes -= region.nbytes
        self.quarantined_bytes += region.nbytes

    def free(self, region: Region) -> None:
        """Gives a used or quarantined region back; raises ValueError for one that is neither."""
        size, quarantined = self._held.get(region.offset, (0, False))
        if size != region.nbytes:
            raise ValueError(f"{region} is not held")
        del self._held[region.offset]
        if quarantined:
            self.quarantined_bytes -= size
        else:
            self.used_bytes -= size
        self._return(region.offset, size)

    def _return(self, offset: int, size: int) -> None:
        at = bisect_left(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == offset + size:
            size += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == offset:
            offset, before = self._free.pop(at - 1)
            size += before
            at -= 1
        self._free.insert(at, (offset, size))


def _round_up(nbytes: int) -> int:
    if nbytes <= 0:
        raise ValueError(f"{nbytes} bytes")
    return -(-nbytes // ALIGN) * ALIGN


class HostMemory:
    """Bytes at a fixed address, resident only where touched; transports register them once."""

    def __init__(self, nbytes: int) -> None:
        room = np.empty(nbytes + _PAGE_BYTES, dtype=np.uint8)
        skip = -int(room.ctypes.data) % _PAGE_BYTES
        self._bytes = room[skip : skip + nbytes]
        self.nbytes = nbytes
        self.address = int(self._bytes.ctypes.data)

    def view(self, offset: int, nbytes: int) -> memoryview:
        if not (offset >= 0 and nbytes >= 0 and offset + nbytes <= self.nbytes):
            raise ValueError(f"[{offset}, {offset + nbytes}) outside {self.nbytes} bytes")
        return self._bytes.data[offset : offset + nbytes]


@dataclass(frozen=True, slots=True)
class PoolStats:
    used_bytes: int
    total_bytes: int
    quarantined_bytes: int


class BufferPool:
    """An :class:`Arena` over :class:`HostMemory` that several threads take from and give to."""

    def __init__(self, total_bytes: int) -> None:
        self._arena = Arena(total_bytes)
        self.memory = HostMemory(self._arena.total_bytes)
        self._changed = threading.Condition()
        self._quarantine: list[tuple[Region, Callable[[], bool]]] = []

    def take(self, nbytes: int, *, timeout_s: float = 0.0) -> Region | None:
        """A region of at least ``nbytes``, waiting up to ``timeout_s`` for one; None when there is none by then."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (region := self._arena.allocate(nbytes)) is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0.0:
                    return None
                self._changed.wait(left_s)
            return region

    def shrink(self, region: Region, nbytes: int) -> Region:
        with self._changed:
            kept = self._arena.shrink(region, nbytes)
            self._changed.notify_all()
            return kept

    def give(self, region: Region) -> None:
        with self._changed:
            self._arena.free(region)
            self._changed.notify_all()

    def quarantine(self, region: Region, ended: Callable[[], bool]) -> None:
        """Sets ``region`` aside until ``ended()`` says that the transfer into it can write no more."""
        with self._changed:
            self._arena.quarantine(region)
            self._quarantine.append((region, ended))

    def sweep(self) -> None:
        """Frees the quarantined regions whose transfer has ended. May block as long as ``ended`` does."""
        with self._changed:
            waiting, self._quarantine = self._quarantine, []
        still = []
        for region, ended in waiting:
            if ended():
                self.give(region)
            else:
                still.append((region, ended))
        with self._changed:
            self._quarantine += still

    def stats(self) -> PoolStats:
        with self._changed:
            return PoolStats(self._arena.used_bytes, self._arena.total_bytes, self._arena.quarantined_bytes)
