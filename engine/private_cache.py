"""The KV caches of ranks that see only their own, as one for the handoff: on GPUs, one rank each.

    rank 0, any thread                         rank r, its copying thread
    gather ── Gather ────────────────────────> waits until its step has come as far as rank 0's
                                               its rows of the cache ─> its part of the staging memory
           <──────────────────────── Copied ──
    joins all parts                            (scatter: the same, the other way round)

Requests have a socket of their own, so that neither steps nor copies wait for each other. One copy at a time: the
staging memory has room for one, and a handoff reads or writes with one thread.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.errors import ProtocolError
from baton.layout import KVLayout
from baton.records import pack
from engine.cache import TORCH_DTYPES, KVCache, require_inside, window
from engine.channel import Channel, Copied, Gather, Scatter
from engine.collective import Collective
from engine.comm import RankLost
from engine.heads import join_heads, share_of, split_heads

log = logging.getLogger(__name__)

STAGING_BYTES = 8 << 20  # of all ranks: several blocks of a handoff
COPY_TIMEOUT_S = 10.0  # how long one may take; rank 0 was at the same point of the step before it asked
IDLE_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class Staging:
    """Host memory that all ranks map: one layer of some tokens, rank by rank, as rows of the rank's cache."""

    layout: KVLayout  # of the whole model
    ranks: int

    @property
    def tokens(self) -> int:
        """Most that one copy takes."""
        return max(1, STAGING_BYTES // self.layout.layer_token_bytes)

    @property
    def bytes(self) -> int:
        return self.tokens * self.layout.layer_token_bytes

    def part(self, memory: mmap.mmap, rank: int) -> Tensor:
        """``rank``'s as a view of ``memory``: [tokens, 2 * kv_heads / ranks, head_dim], keys first."""
        share = share_of(self.layout, self.ranks)
        size = self.tokens * share.layer_token_bytes
        raw = torch.frombuffer(memory, dtype=torch.uint8, offset=rank * size, count=size)
        return raw.view(TORCH_DTYPES[share.dtype]).view(self.tokens, 2 * share.kv_heads, share.head_dim)


class PrivateKVCaches:
    """All ranks' caches as one (:class:`engine.cache.PagedKV`), for the process of rank 0. K and V are on the host.

    What a step wrote before rank 0 announced a layer, each rank copies after it has made the sums that rank 0 had made
    when it asked: its own writes of that layer come before them. What is scattered is in every rank's cache, or queued
    before its next step, when the call returns.
    """

    def __init__(
        self,
        staging: Staging,
        memory: mmap.mmap,
        own: KVCache,
        comm: Collective,
        others: Sequence[Channel],
        *,
        check: Callable[[], None],
        on_lost: Callable[[RankLost], None],
    ) -> None:
        """``others``: a channel to each of ranks 1, 2, ...; ``check`` raises when one of them is known to be lost."""
        self.layout, self.own = staging.layout, own
        self._piece, self._comm, self._others = staging.tokens, comm, others
        self._parts = [staging.part(memory, rank) for rank in range(staging.ranks)]
        self._check, self._on_lost = check, on_lost
        self._gate = threading.Lock()  # every wait of who holds it has a deadline

    @property
    def bytes(self) -> int:
        return self.own.bytes * len(self._parts)

    def gather(self, layer: int, pages: Sequence[int], start: int, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`engine.cache.PagedKV.gather`. Raises :class:`RankLost`."""
        self._require(layer, pages, start, count)
        pieces = [self._gather(layer, pages, start + at, size) for at, size in self._pieces(count)]
        return torch.cat([keys for keys, _ in pieces]), torch.cat([values for _, values in pieces])

    def scatter(self, layer: int, pages: Sequence[int], start: int, k: Tensor, v: Tensor) -> None:
        """As :meth:`engine.cache.PagedKV.scatter`. Raises :class:`RankLost`."""
        self._require(layer, pages, start, k.shape[0])
        for at, size in self._pieces(k.shape[0]):
            self._scatter(layer, pages, start + at, k[at : at + size], v[at : at + size])

    def _pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Offset and size of what fits the staging memory; one empty piece for nothing."""
        for at in range(0, max(count, 1), self._piece):
            yield at, min(count - at, self._piece)

    def _require(self, layer: int, pages: Sequence[int], start: int, count: int) -> None:
        """A request that fails here half done would leave answers that nobody waits for."""
        require_inside(pages, start, count, self.own.page_tokens)
        if not 0 <= layer < self.layout.layers:
            raise IndexError(f"layer {layer} is none of {self.layout.layers}")

    def _gather(self, layer: int, pages: Sequence[int], start: int, count: int) -> tuple[Tensor, Tensor]:
        part, offset = window(pages, start, count, self.own.page_tokens)
        with self._gate:
            self._ask(Gather(layer, part, offset, count, self._comm.rounds))
            self._parts[0][:count].copy_(self.own.rows(layer, part, offset, count))
            self._await_all()
            return join_heads([rows[:count] for rows in self._parts])

    def _scatter(self, layer: int, pages: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[0]
        part, offset = window(pages, start, count, self.own.page_tokens)
        with self._gate:
            for rows, heads in zip(self._parts, split_heads(keys, values, len(self._parts)), strict=True):
                rows[:count].copy_(heads)
            self._ask(Scatter(layer, part, offset, count))
            self.own.write_rows(layer, part, offset, self._parts[0][:count])
            self._await_all()

    def _ask(self, request: Gather | Scatter) -> None:
        self._check()
        body = pack(request)
        for rank, channel in enumerate(self._others, start=1):
            try:
                channel.send_packed(body)
            except OSError as error:  # TimeoutError is one
                raise self._lost(rank, f"it takes no copies: {error}") from None

    def _await_all(self) -> None:
        deadline_s = time.monotonic() + COPY_TIMEOUT_S
        for rank, channel in enumerate(self._others, start=1):
            try:
                answer = channel.receive(max(deadline_s - time.monotonic(), 0.0))
            except (OSError, ProtocolError) as error:
                raise self._lost(rank, f"no copy after {COPY_TIMEOUT_S:g} s: {error!r}") from None
            if not isinstance(answer, Copied):
                raise self._lost(rank, "it copies no more; its log says why")

    def _lost(self, rank: int, reason: str) -> RankLost:
        """An answer may come yet, so that no later one could be trusted."""
        lost = RankLost(rank, reason)
        self._on_lost(lost)
        return lost


class Copier:
    """The other end, in another rank's process: copies between its cache and its part of the staging memory."""

    def __init__(self, part: Tensor, cache: KVCache, comm: Collective, channel: Channel) -> None:
        """``part``: of :meth:`Staging.part`."""
        self._part, self._cache, self._comm, self._channel = part, cache, comm, channel
        self._thread = threading.Thread(target=self._run, name="kv-copy", daemon=True)

    def start(self) -> None:
        """Serves until rank 0 closes its end."""
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._channel:  # closed, it tells rank 0 that this rank copies no more
                self._serve()
        except Exception:  # the thread's outer boundary
            log.exception("cannot copy KV")

    def _serve(self) -> None:
        while True:
            try:
                request = self._channel.receive(IDLE_POLL_S)
            except TimeoutError:
                continue  # idle: a rank 0 that has died closes the channel
            if request is None:
                return
            assert isinstance(request, Gather | Scatter)
            self._copy(request)
            self._channel.send(Copied(request.count))

    def _copy(self, request: Gather | Scatter) -> None:
        layer, pages, start, count = request.layer, request.pages, request.start, request.count
        rows = self._part[:count]
        if isinstance(request, Gather):
            self._comm.await_round(request.after, COPY_TIMEOUT_S)
            rows.copy_(self._cache.rows(layer, pages, start, count))
        else:
            self._cache.write_rows(layer, pages, start, rows)
