"""What is fetched of announced parcels, and what is told of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from baton.layout import KVLayout
from kvtransfer.arena import BufferPool
from kvtransfer.codecs import make_codec
from kvtransfer.landing import Gate, Lander, Landing, Puller
from kvtransfer.protocol import Block, Parcel, aligned, block_digest

LAYOUT = KVLayout("m", 64, 1, 8, "float32")
TOKENS = 3
NBYTES = make_codec("raw", LAYOUT).bound(TOKENS)
STEP = aligned(NBYTES)


class Peer:
    """A peer's memory; fetches wait until it is let go."""

    def __init__(self, pool):
        self.memory, self._pool = bytearray(4096), pool
        self.fetches = []
        self.go = threading.Event()

    def fetch(self, offset, nbytes, at, deadline_s):
        self.fetches.append((offset, nbytes))
        assert self.go.wait(5)
        self._pool.memory.view(at, nbytes)[:] = self.memory[offset : offset + nbytes]
        return 0.0

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

    def parcel(self, peer, seq, offset, *layers, right=True):
        """Announces ``layers``, staged from ``offset`` on."""
        blocks = []
        for at, layer in enumerate(layers):
            kv = torch.full((TOKENS, 1, 8), float(layer))
            view = memoryview(peer.memory)[offset + at * STEP :][:NBYTES]
            make_codec("raw", LAYOUT).encode(kv, kv, view)
            place = {"layer": layer, "start": 0, "count": TOKENS, "codec": "raw", "layout": LAYOUT.fingerprint}
            digest = block_digest(view, request_id=self.name, epoch=1, **place)
            blocks.append(Block(layer, 0, TOKENS, NBYTES, digest if right else bytes(16)))
        return Parcel(self.name, 1, seq, "raw", offset, tuple(blocks))


def until(happened):
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pool():
    pool = BufferPool(1 << 16)
    yield pool
    assert pool.stats().used_bytes == 0


@pytest.fixture
def peer(pool):
    return Peer(pool)


@pytest.fixture
def puller(pool, peer):
    lander = Lander(LAYOUT, pool)
    puller = Puller(peer, pool, lander, LAYOUT, stall_s=5.0, on_broken=lambda reason: None, name="p")
    yield puller
    puller.stop()
    puller.join(5)
    lander.close()


def test_a_parcel_is_one_fetch_and_one_acknowledgement(peer, puller):
    request = Request("r")
    peer.go.set()
    puller.pull(request.parcel(peer, 0, 64, 0, 1, 2), request.landing)
    until(lambda: request.arrived)
    assert peer.fetches == [(64, 2 * STEP + NBYTES)]
    assert [(one.seq, one.nbytes) for one in request.arrived] == [(0, 2 * STEP + NBYTES)]
    assert all((request.written[layer] == layer).all() for layer in range(3))


def test_a_wrong_parcel_loses_its_own_request_only(peer, puller):
    bad, good = Request("bad"), Request("good")
    puller.pull(bad.parcel(peer, 0, 0, 0), bad.landing)
    puller.pull(bad.parcel(peer, 1, STEP, 1, right=False), bad.landing)
    puller.pull(bad.parcel(peer, 2, 2 * STEP, 2), bad.landing)
    puller.pull(good.parcel(peer, 0, 3 * STEP, 0), good.landing)
    peer.go.set()
    until(lambda: good.arrived)
    assert bad.lost == ["parcel 1: digest mismatch"]
    assert set(bad.written) == {0}  # and not the good one behind the wrong one


def test_a_request_given_up_is_not_fetched(peer, puller):
    gone, request = Request("gone"), Request("r")
    gone.landing.gate.close()
    puller.pull(request.parcel(peer, 0, 0, 0), request.landing)
    puller.pull(gone.parcel(peer, 0, STEP, 0), gone.landing)
    puller.pull(request.parcel(peer, 1, 2 * STEP, 1), request.landing)
    peer.go.set()
    until(lambda: len(request.arrived) == 2)
    assert peer.fetches == [(0, NBYTES), (2 * STEP, NBYTES)]
    assert not gone.written


def test_little_is_fetched_ahead_of_what_lands(peer, puller):
    """One parcel lands, one waits, one is fetched: what is fetched long before it lands leaves the cache."""
    request, landing, go_on = Request("r"), threading.Event(), threading.Event()

    def write(layer, start, keys, values):
        landing.set()
        assert go_on.wait(5)

    request.landing.write = write
    peer.go.set()
    for seq in range(6):
        puller.pull(request.parcel(peer, seq, seq * STEP, seq), request.landing)
    assert landing.wait(5)
    until(lambda: len(peer.fetches) == 3)
    time.sleep(0.05)
    assert len(peer.fetches) == 3
    go_on.set()
    until(lambda: len(request.arrived) == 6)


def test_a_loss_is_told_when_its_landing_buffer_is_free_again(pool, peer, puller):
    request, held = Request("r"), []
    request.landing.on_lost = lambda reason: (held.append(pool.stats().used_bytes), request.lost.append(reason))
    peer.go.set()
    puller.pull(request.parcel(peer, 0, 0, 0, right=False), request.landing)
    until(lambda: request.lost)
    assert held == [0]
    assert request.lost == ["parcel 0: digest mismatch"]
    assert request.landing.gate.closed
    assert request.written == {}
