"""Which announced blocks one fetch brings, and what is told of them."""

from __future__ import annotations

import threading
import time

import torch

from baton.layout import KVLayout
from kvtransfer.arena import ALIGN, BufferPool
from kvtransfer.codecs import make_codec
from kvtransfer.landing import MOST_TOGETHER, Gate, Lander, Landing, Puller
from kvtransfer.protocol import Block, block_digest

LAYOUT = KVLayout("m", 64, 1, 8, "float32")
TOKENS = 3
NBYTES = make_codec("raw", LAYOUT).bound(TOKENS)
STEP = -(-NBYTES // ALIGN) * ALIGN  # how far apart staging puts blocks


class Peer:
    """A peer's memory; the first fetch waits until it is let go, so that everything announced meanwhile waits."""

    def __init__(self, pool):
        self.memory, self._pool = bytearray(4096), pool
        self.fetches = []
        self.go = threading.Event()

    def fetch(self, offset, nbytes, at, deadline_s):
        self.fetches.append((offset, nbytes))
        assert self.go.wait(5)
        self._pool.memory.view(at, nbytes)[:] = self.memory[offset : offset + nbytes]

    def interrupt(self): ...

    def close(self): ...


class Request:
    """One request's landing: what was written, acknowledged and lost."""

    def __init__(self, name):
        self.name, self.written, self.arrived, self.lost = name, {}, [], []
        self.landing = Landing(
            Gate(lambda: None), self._write, on_arrived=self.arrived.append, on_lost=self.lost.append
        )

    def _write(self, layer, start, keys, values):
        self.written[layer] = keys.clone()

    def block(self, peer, seq, offset, *, right=True):
        """Announces layer ``seq``, staged at ``offset``."""
        kv = torch.full((TOKENS, 1, 8), float(seq))
        view = memoryview(peer.memory)[offset : offset + NBYTES]
        make_codec("raw", LAYOUT).encode(kv, kv, view)
        digest = block_digest(
            view,
            request_id=self.name,
            epoch=1,
            layout=LAYOUT.fingerprint,
            layer=seq,
            start=0,
            count=TOKENS,
            codec="raw",
        )
        return Block(self.name, 1, seq, seq, 0, TOKENS, "raw", offset, NBYTES, digest if right else bytes(16))


def until(happened):
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def pulled(announce, *, most_bytes=4 * STEP):
    """What ``announce(peer)`` returns is fetched and landed, after a block at 3072 that holds the first fetch up."""
    pool = BufferPool(1 << 16)
    lander, peer, first = Lander(LAYOUT, pool), Peer(pool), Request("first")
    puller = Puller(
        peer, pool, lander, LAYOUT, most_bytes=most_bytes, stall_s=5.0, on_broken=lambda reason: None, name="p"
    )
    puller.pull(first.block(peer, 0, 3072), first.landing)
    until(lambda: peer.fetches)
    for block, landing in announce(peer):
        puller.pull(block, landing)
    last = Request("last")
    puller.pull(last.block(peer, 0, 3072), last.landing)
    peer.go.set()
    until(lambda: last.arrived)
    puller.stop()
    puller.join(5)
    lander.close()
    assert pool.stats().used_bytes == 0
    return peer.fetches[1:-1]


def seqs(request):
    return [[one.seq for one in some] for some in request.arrived]


def test_blocks_side_by_side_are_one_fetch_and_one_acknowledgement():
    request = Request("r")
    fetches = pulled(lambda peer: [(request.block(peer, seq, seq * STEP), request.landing) for seq in range(3)])
    assert fetches == [(0, 2 * STEP + NBYTES)]
    assert seqs(request) == [[0, 1, 2]]
    assert all((request.written[seq] == seq).all() for seq in range(3))


def test_a_run_ends_at_a_gap_and_at_the_most_bytes():
    request = Request("r")
    places = [0, STEP, 2 * STEP, 3 * STEP, 5 * STEP, 6 * STEP]
    fetches = pulled(
        lambda peer: [(request.block(peer, seq, at), request.landing) for seq, at in enumerate(places)],
        most_bytes=2 * STEP + NBYTES,
    )
    assert [offset for offset, _ in fetches] == [0, 3 * STEP, 5 * STEP]
    assert seqs(request) == [[0, 1, 2], [3], [4, 5]]
    assert all((request.written[seq] == seq).all() for seq in range(6))


def test_a_run_has_so_many_blocks_at_most():
    request = Request("r")
    fetches = pulled(
        lambda peer: [(request.block(peer, seq, seq * STEP), request.landing) for seq in range(MOST_TOGETHER + 2)],
        most_bytes=1 << 15,
    )
    assert [offset for offset, _ in fetches] == [0, MOST_TOGETHER * STEP]
    assert sorted(request.written) == list(range(MOST_TOGETHER + 2))


def test_requests_that_share_a_fetch_are_told_apart():
    one, other = Request("one"), Request("other")
    fetches = pulled(
        lambda peer: [
            (one.block(peer, 0, 0), one.landing),
            (other.block(peer, 0, STEP), other.landing),
            (one.block(peer, 1, 2 * STEP), one.landing),
        ]
    )
    assert len(fetches) == 1
    assert (seqs(one), seqs(other)) == ([[0, 1]], [[0]])
    assert sum(some[0].fetch_s for some in other.arrived) > 0


def test_a_wrong_block_loses_its_own_request_only():
    bad, good = Request("bad"), Request("good")
    pulled(
        lambda peer: [
            (bad.block(peer, 0, 0), bad.landing),
            (bad.block(peer, 1, STEP, right=False), bad.landing),
            (bad.block(peer, 2, 2 * STEP), bad.landing),
            (good.block(peer, 0, 3 * STEP), good.landing),
        ]
    )
    assert bad.lost == ["block 1: digest mismatch"]
    assert set(bad.written) == {0}  # and not the good block behind the wrong one
    assert seqs(good) == [[0]]


def test_a_request_given_up_is_not_fetched():
    gone, request = Request("gone"), Request("r")
    gone.landing.gate.close()
    fetches = pulled(
        lambda peer: [
            (request.block(peer, 0, 0), request.landing),
            (gone.block(peer, 0, STEP), gone.landing),
            (request.block(peer, 1, 2 * STEP), request.landing),
        ]
    )
    assert fetches == [(0, NBYTES), (2 * STEP, NBYTES)]
    assert not gone.written


def test_a_loss_is_told_when_its_landing_buffer_is_free_again():
    pool, request, held = BufferPool(1 << 16), Request("r"), []
    request.landing.on_lost = lambda reason: (held.append(pool.stats().used_bytes), request.lost.append(reason))
    lander, peer = Lander(LAYOUT, pool), Peer(pool)
    puller = Puller(peer, pool, lander, LAYOUT, most_bytes=STEP, stall_s=5.0, on_broken=lambda reason: None, name="p")
    peer.go.set()
    puller.pull(request.block(peer, 0, 0, right=False), request.landing)
    until(lambda: request.lost)
    puller.stop()
    puller.join(5)
    lander.close()
    assert held == [0]
    assert request.lost == ["block 0: digest mismatch"]
    assert request.landing.gate.closed
    assert request.written == {}
