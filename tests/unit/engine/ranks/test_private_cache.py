"""Caches that rank 0 cannot reach, as one: copies by request, in order with the steps, bounded in every wait."""

from __future__ import annotations

import mmap
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from baton.layout import KVLayout
from engine import private_cache
from engine.cache import KVCache, window
from engine.channel import Channel, Gather
from engine.collective import Collective
from engine.comm import RankLost
from engine.heads import share_of
from engine.private_cache import Copier, PrivateKVCaches, Staging

PAGES, PAGE = 6, 4
CPU = torch.device("cpu")


def layout(dtype: str) -> KVLayout:
    return KVLayout("model", layers=2, kv_heads=6, head_dim=8, dtype=dtype)  # type: ignore[arg-type]


class Replica:
    """Ranks in one process: their caches and copiers are real, their sums are only counted."""

    def __init__(self, ranks: int, dtype: str = "float32") -> None:
        self.staging = Staging(layout(dtype), ranks)
        self.memory = mmap.mmap(-1, self.staging.bytes)
        share = share_of(layout(dtype), ranks)
        self.caches = [KVCache(share, pages=PAGES, page_tokens=PAGE, device=CPU) for _ in range(ranks)]
        self.comms = [Collective(rank=rank, ranks=ranks, device=CPU) for rank in range(ranks)]
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1, ranks)]
        self.ours = [Channel(ours, peer=f"rank {rank}") for rank, (ours, _) in enumerate(pairs, start=1)]
        self.theirs = [Channel(theirs, peer="rank 0") for _, theirs in pairs]
        self.lost: list[RankLost] = []
        self.served = False
        self.cache = PrivateKVCaches(
            self.staging, self.memory, self.caches[0], self.comms[0], self.ours,
            check=self._check, on_lost=self.lost.append,
        )  # fmt: skip

    def _check(self) -> None:
        if self.lost:
            raise self.lost[0]

    def serve(self) -> None:
        self.served = True
        for rank, channel in enumerate(self.theirs, start=1):
            part = self.staging.part(self.memory, rank)
            Copier(part, self.caches[rank], self.comms[rank], channel).start()

    def close(self) -> None:
        for channel in self.ours if self.served else self.ours + self.theirs:  # its copier closes a rank's end
            channel.close()


@pytest.fixture
def replica() -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(ranks: int, dtype: str = "float32", *, serve: bool = True) -> Replica:
        made.append(Replica(ranks, dtype))
        if serve:
            made[-1].serve()
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_what_is_scattered_is_gathered_and_equals_one_ranks_cache(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch, ranks: int, dtype: str, tokens: int
) -> None:
    """``tokens`` of room in the staging memory: longer copies go in pieces."""
    monkeypatch.setattr(private_cache, "STAGING_BYTES", tokens * layout(dtype).layer_token_bytes)
    cache = replica(ranks, dtype).cache
    plain = KVCache(layout(dtype), pages=PAGES, page_tokens=PAGE, device=CPU)
    assert cache.bytes == plain.bytes
    pages, generator = (4, 0, 3), torch.Generator().manual_seed(ranks)
    for layer in range(2):
        keys, values = (torch.randn(7, 6, 8, generator=generator) for _ in range(2))
        for one in (cache, plain):
            one.scatter(layer, pages, 3, keys, values)
    for layer in range(2):
        for start, count in [(0, 12), (3, 7), (5, 1), (9, 0)]:
            got, expected = cache.gather(layer, pages, start, count), plain.gather(layer, pages, start, count)
            assert all(torch.equal(*pair) and pair[0].is_contiguous() for pair in zip(got, expected, strict=True))


def test_a_rank_holds_its_own_heads(replica: Callable[..., Replica]) -> None:
    three = replica(3)
    keys = torch.arange(6.0)[None, :, None].expand(1, 6, 8)  # the value is the head's number
    three.cache.scatter(1, (2,), 1, keys, keys + 10)
    for rank, cache in enumerate(three.caches):
        own, first = cache.layers[1][2 * PAGE + 1], 2.0 * rank  # [2 * kv_heads / ranks, head_dim]
        assert own[:, 0].tolist() == [first, first + 1, first + 10, first + 11]
        assert cache.layers[0].count_nonzero() == 0


def test_a_rank_copies_only_when_its_step_has_come_as_far(replica: Callable[..., Replica]) -> None:
    two = replica(2)
    two.comms[0].all_reduce(torch.empty(0))  # rank 0 is one sum ahead
    with ThreadPoolExecutor(1) as pool:
        copied = pool.submit(two.cache.gather, 0, (0,), 0, 2)
        time.sleep(0.1)
        assert not copied.done()
        two.caches[1].layers[0].fill_(7.0)  # what the step writes before that sum
        two.comms[1].all_reduce(torch.empty(0))
        keys, _ = copied.result(5.0)
    assert keys[:, 3:].eq(7.0).all()
    assert keys[:, :3].eq(0.0).all()


def test_copies_from_several_threads_do_not_mix(replica: Callable[..., Replica]) -> None:
    cache = replica(2).cache

    def turn(page: int) -> bool:
        value = torch.full((PAGE, 6, 8), float(page))
        for _ in range(30):
            cache.scatter(0, (page,), 0, value, -value)
            keys, values = cache.gather(0, (page,), 0, PAGE)
            if not (torch.equal(keys, value) and torch.equal(values, -value)):
                return False
        return True

    with ThreadPoolExecutor(PAGES) as pool:
        assert all(pool.map(turn, range(PAGES)))


@pytest.mark.parametrize(("layer", "start", "count"), [(0, -1, 2), (0, 7, 2), (0, 0, -1), (2, 0, 1), (-1, 0, 1)])
def test_what_lies_outside_is_refused_before_anybody_is_asked(
    replica: Callable[..., Replica], layer: int, start: int, count: int
) -> None:
    cache = replica(2).cache
    with pytest.raises(IndexError):
        cache.gather(layer, (0, 1), start, count)
    if count > 0:
        with pytest.raises(IndexError):
            cache.scatter(layer, (0, 1), start, torch.ones(count, 6, 8), torch.ones(count, 6, 8))
    cache.gather(0, (0, 1), 0, 8)  # and nothing is out of step


def test_a_rank_that_does_not_answer_is_lost_for_good(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_cache, "COPY_TIMEOUT_S", 0.2)
    two = replica(2, serve=False)
    for _ in range(2):
        with pytest.raises(RankLost, match=r"rank 1 is lost: no copy after 0\.2 s"):
            two.cache.gather(0, (0,), 0, 1)
    assert len(two.lost) == 1
    assert isinstance(two.theirs[0].receive(1.0), Gather)
    with pytest.raises(TimeoutError):  # it was asked once
        two.theirs[0].receive(0.1)


def test_a_rank_whose_step_stands_still_copies_no_more(
    replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two = replica(2)
    two.comms[0].all_reduce(torch.empty(0))
    wait = two.comms[1].await_round
    monkeypatch.setattr(two.comms[1], "await_round", lambda number, timeout_s: wait(number, 0.1))
    with pytest.raises(RankLost, match="rank 1 is lost: it copies no more"):
        two.cache.gather(0, (0,), 0, 1)
    deadline_s = time.monotonic() + 5.0
    while "1 rounds behind" not in caplog.text:  # the rank's thread says so once it has closed its end
        assert time.monotonic() < deadline_s, caplog.text
        time.sleep(0.01)


def test_a_rank_that_is_gone_is_lost_at_once(replica: Callable[..., Replica]) -> None:
    two = replica(2, serve=False)
    two.theirs[0].close()
    started_s = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 is lost: it takes no copies"):
        two.cache.scatter(0, (0,), 0, torch.ones(1, 6, 8), torch.ones(1, 6, 8))
    assert time.monotonic() - started_s < 1.0


def test_the_copying_thread_ends_with_the_channel(replica: Callable[..., Replica]) -> None:
    two = replica(2)
    assert any(thread.name == "kv-copy" for thread in threading.enumerate())
    two.ours[0].close()
    deadline_s = time.monotonic() + 5.0
    while any(thread.name == "kv-copy" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("page_tokens", [1, 3, 4])
def test_the_window_of_a_block_table_holds_the_same_tokens(page_tokens: int) -> None:
    pages = tuple(range(10, 15))
    for start in range(5 * page_tokens + 1):
        for count in range(5 * page_tokens - start + 1):
            part, offset = window(pages, start, count, page_tokens)
            for token in range(count):
                here, there = offset + token, start + token
                assert part[here // page_tokens] == pages[there // page_tokens]
                assert here % page_tokens == there % page_tokens
            assert len(part) <= count // page_tokens + 2
