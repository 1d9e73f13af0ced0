"""What the ranks of one replica stand on, by the means they meet: built alike in every rank's process."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.layout import Dtype, KVLayout
from engine import hub
from engine.cache import KVCache
from engine.channel import Channel
from engine.collective import Collective
from engine.comm import RankLost
from engine.devices import Means, device_of
from engine.heads import share_of
from engine.private_cache import Copier, PrivateKVCaches, Staging
from engine.shared_cache import Segment, SharedKVCache
from engine.shared_reduce import SharedReduce
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Ground:
    means: Means
    layout: KVLayout  # of the whole model
    ranks: int
    pages: int
    page_tokens: int

    @property
    def shared_bytes(self) -> int:
        """Of the memory that all ranks map."""
        return self._segment.bytes if self.means == "shared" else self._staging.bytes

    def comm(
        self, memory: mmap.mmap, rank: int, *, check_peers: Callable[[], None], timeout_s: float | None = None
    ) -> SharedReduce | Collective:
        """``rank``'s end of the sums; a :class:`Collective` has yet to connect."""
        if self.means == "shared":
            return SharedReduce(memory, rank=rank, ranks=self.ranks, check_peers=check_peers, timeout_s=timeout_s)
        device = device_of(self.means, rank)
        return Collective(rank=rank, ranks=self.ranks, device=device, check_peers=check_peers, timeout_s=timeout_s)

    def cache(self, memory: mmap.mmap, rank: int) -> KVCache:
        """``rank``'s own: a part of ``memory``, or memory of its device."""
        if self.means == "shared":
            return self._segment.cache(memory, rank)
        share, device = share_of(self.layout, self.ranks), device_of(self.means, rank)
        return KVCache(share, pages=self.pages, page_tokens=self.page_tokens, device=device)

    def whole(
        self,
        memory: mmap.mmap,
        comm: SharedReduce | Collective,
        others: Sequence[Channel],
        *,
        check: Callable[[], None],
        on_lost: Callable[[RankLost], None],
    ) -> SharedKVCache | PrivateKVCaches:
        """All ranks' caches as one, for rank 0. ``others``: where ranks 1, 2, ... take copies, if they do."""
        if isinstance(comm, SharedReduce):
            return SharedKVCache(self._segment, memory)
        own = self.cache(memory, 0)
        return PrivateKVCaches(self._staging, memory, own, comm, others, check=check, on_lost=on_lost)

    def copier(
        self, memory: mmap.mmap, rank: int, cache: KVCache, comm: SharedReduce | Collective, channel: Channel
    ) -> Copier | None:
        """What answers rank 0's copies over ``channel``; None where rank 0 reaches ``cache`` by itself."""
        if isinstance(comm, SharedReduce):
            return None
        return Copier(self._staging.part(memory, rank), cache, comm, channel)

    @property
    def _segment(self) -> Segment:
        return Segment(self.layout, self.ranks, self.pages, self.page_tokens)

    @property
    def _staging(self) -> Staging:
        return Staging(self.layout, self.ranks)


def ground_for(folder: Path, means: Means, ranks: int, dtype: Dtype, *, pages: int, page_tokens: int) -> Ground:
    """The ground of ``ranks`` that run the model in ``folder`` with KV in ``dtype``."""
    spec = ModelSpec.from_folder(folder)
    layout = KVLayout(hub.describe(folder), spec.layers, spec.kv_heads, spec.head_dim, dtype)
    return Ground(means, layout, ranks, pages, page_tokens)
