"""The KV caches of all ranks of one machine in one piece of shared memory, so that rank 0 hands over whole heads.

A rank holds some of the KV heads of every token. What leaves a worker and what lands in it has all of them in order
(:class:`baton.layout.KVLayout`), so neither side of a handoff knows how many ranks the other has.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.layout import KVLayout
from engine.cache import KVCache
from engine.heads import join_heads, share_of, split_heads
from engine.shared_reduce import shared_bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """How the shared memory of a replica is divided: the all-reduce's part first, then one KV cache per rank."""

    layout: KVLayout  # of the whole model
    ranks: int
    pages: int
    page_tokens: int

    @property
    def share(self) -> KVLayout:
        """What one rank holds of each token."""
        return share_of(self.layout, self.ranks)

    @property
    def cache_bytes(self) -> int:
        """Of one rank."""
        return self.pages * self.page_tokens * self.share.token_bytes

    @property
    def bytes(self) -> int:
        return self._caches_start + self.ranks * self.cache_bytes

    def cache(self, memory: mmap.mmap, rank: int) -> KVCache:
        """``rank``'s own cache, a view of ``memory``."""
        start = self._caches_start + rank * self.cache_bytes
        part = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=self.cache_bytes)
        return KVCache(
            self.share, pages=self.pages, page_tokens=self.page_tokens, device=torch.device("cpu"), memory=part
        )

    @property
    def _caches_start(self) -> int:
        return -(-shared_bytes(self.ranks) // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedKVCache:
    """All ranks' caches as one (:class:`engine.cache.PagedKV`), for the process of rank 0.

    A step's all-reduce orders what the ranks wrote in it before what rank 0 reads afterwards, and the message that
    starts a step orders what rank 0 wrote before what the ranks read in it.
    """

    def __init__(self, segment: Segment, memory: mmap.mmap) -> None:
        self.layout, self.page_tokens = segment.layout, segment.page_tokens
        self.shards = [segment.cache(memory, rank) for rank in range(segment.ranks)]

    @property
    def own(self) -> KVCache:
        """Rank 0's."""
        return self.shards[0]

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def gather(self, layer: int, pages: Sequence[int], start: int, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`engine.cache.PagedKV.gather`: K and V of all ranks' heads in order."""
        return join_heads([shard.rows(layer, pages, start, count) for shard in self.shards])

    def scatter(self, layer: int, pages: Sequence[int], start: int, k: Tensor, v: Tensor) -> None:
        """As :meth:`engine.cache.PagedKV.scatter`: each rank's heads to its own pages."""
        for shard, rows in zip(self.shards, split_heads(k, v, len(self.shards)), strict=True):
            shard.write_rows(layer, pages, start, rows)
