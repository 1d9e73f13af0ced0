from __future__ import annotations

import threading

import pytest
import torch

from baton.layout import KVLayout
from kvtransfer.arena import BufferPool
from kvtransfer.chooser import Candidate, Speed
from kvtransfer.coverage import Coverage, Span
from kvtransfer.encoder import Encoder, Feed
from kvtransfer.handoff import Dispatch, Lost
from kvtransfer.protocol import MOST_BLOCKS, Ack, Welcome, aligned, block_digest
from kvtransfer.route import Ratios, Route

LAYOUT = KVLayout("m", 64, 1, 16, "float32")  # 128 bytes a token and layer
RATIOS = Ratios([])
SPAN_BYTES = 8 * LAYOUT.layer_token_bytes


class Staged:
    """The parcels that a feed announced, for a test to wait on."""

    def __init__(self):
        self.parcels, self.changed = [], threading.Condition()

    def __call__(self, parcel):
        with self.changed:
            self.parcels.append(parcel)
            self.changed.notify_all()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.parcels) >= count, 5), f"{len(self.parcels)} of {count}"


@pytest.fixture
def staging():
    return BufferPool(8 * SPAN_BYTES)


@pytest.fixture
def encoder(staging):
    encoder = Encoder(LAYOUT, staging, RATIOS)
    yield encoder
    encoder.close()
    assert staging.stats().used_bytes == 0


def feed(encoder, peer, gather=None):
    kv = torch.zeros(8, 1, 16)
    made = Feed(
        Dispatch(peer, 1, Coverage(64, 8), 1e9), ("raw",), peer, Route(RATIOS), gather or (lambda *_: (kv, kv)),
        on_staged=Staged(), on_idle=lambda: None, on_failed=lambda reason: None,
    )  # fmt: skip
    encoder.add(made)
    return made


def push(encoder, one, layers):
    for layer in layers:
        assert encoder.push(one, Span(layer, 0, 8))


def test_a_peer_that_acknowledges_nothing_leaves_room_for_others(encoder, staging):
    silent = feed(encoder, "silent")
    push(encoder, silent, range(3))
    silent.on_staged.wait(3)
    quick = feed(encoder, "quick")
    push(encoder, silent, range(3, 20))
    push(encoder, quick, range(20))
    for seq in range(20):
        quick.on_staged.wait(seq + 1)
        encoder.acknowledge(quick, Ack("quick", 1, seq))
    assert len(silent.on_staged.parcels) == 4  # half of the staging
    encoder.drop(quick)
    silent.on_staged.wait(8)  # alone again, it may have all of it
    assert staging.stats().used_bytes == 8 * SPAN_BYTES
    encoder.drop(silent)


def test_what_is_dropped_while_it_is_gathered_frees_its_room(encoder, staging):
    entered, leave, idle = threading.Event(), threading.Event(), threading.Event()
    kv = torch.zeros(8, 1, 16)

    def gather(*_):
        entered.set()
        leave.wait(5)
        return kv, kv

    slow = feed(encoder, "slow", gather)
    slow.on_idle = idle.set
    push(encoder, slow, range(4))
    assert entered.wait(5)
    slow.dispatch.outcome = Lost("gone")
    encoder.drop(slow)
    assert not slow.idle  # its pages are being read
    leave.set()
    assert idle.wait(5)
    assert slow.idle
    assert slow.on_staged.parcels == []
    push(encoder, slow, [5])  # after the end a push changes nothing
    assert slow.idle


def test_a_large_push_is_cut_into_blocks():
    layout = KVLayout("m", 1, 8, 128, "float32")  # 8 KiB a token and layer: 128 tokens a block
    encoder = Encoder(layout, BufferPool(8 << 20), RATIOS)
    kv = torch.zeros(300, 8, 128)
    big = Feed(
        Dispatch("r", 1, Coverage(1, 300), 1e9), ("raw",), "peer", Route(RATIOS),
        lambda layer, start, count: (kv[start : start + count], kv[start : start + count]),
        on_staged=Staged(), on_idle=lambda: None, on_failed=lambda reason: None,
    )  # fmt: skip
    encoder.add(big)
    assert encoder.push(big, Span(0, 0, 300))
    big.on_staged.wait(3)
    cut = [(block.start, block.count) for parcel in big.on_staged.parcels for block in parcel.blocks]
    assert cut == [(0, 128), (128, 128), (256, 44)]
    encoder.drop(big)
    encoder.close()


def test_prefill_goes_on_at_its_pace_from_push_to_push(encoder):
    """Not up to now: until then the encoder may have been at work, and not prefill."""
    coverage = Coverage(LAYOUT.layers, 8)
    made = Feed(
        Dispatch("r", 1, coverage, 1e9), ("raw",), "p", Route(RATIOS), lambda *_: None,
        on_staged=lambda parcel: None, on_idle=lambda: None, on_failed=lambda reason: None,
    )  # fmt: skip
    coverage.add(Span(0, 0, 8))
    made.began_at = made.pushed_at = 10.0
    made.first_pairs = 8

    def prefill_s(now):
        return made.ahead(Span(0, 0, 8), LAYOUT, backlog_bytes=0, now=now).prefill_s

    assert prefill_s(now=10.001) == pytest.approx(0.001 * 63)
    coverage.add(Span(1, 0, 8))
    coverage.add(Span(2, 0, 8))
    made.pushed_at = 10.5
    assert prefill_s(now=10.5) == prefill_s(now=11.5) == pytest.approx(0.25 * 61)


class Held:
    """Gathers nothing until it is let go: what is pushed meanwhile waits together."""

    def __init__(self):
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, layer, start, count):
        self.entered.set()
        assert self.go.wait(5)
        kv = torch.full((count, 1, 16), float(layer))
        return kv, -kv


def together(*, block_s, parcel_bytes, layers, staging_bytes=1 << 20):
    """Parcels of so many layers that waited, after the first; their staging memory."""
    speed = Speed(block_s, 1e12)
    staging, ratios = BufferPool(staging_bytes), Ratios([Candidate("raw", 1.0, speed, speed)])
    encoder, held = Encoder(LAYOUT, staging, ratios), Held()
    one = feed(encoder, "p", held)
    one.route = Route(ratios)
    one.route.welcomed(Welcome("d", "gd", parcel_bytes=parcel_bytes))
    push(encoder, one, [63])
    assert held.entered.wait(5)
    push(encoder, one, range(layers))
    held.go.set()
    with one.on_staged.changed:
        blocks = lambda: sum(len(parcel.blocks) for parcel in one.on_staged.parcels)  # noqa: E731
        assert one.on_staged.changed.wait_for(lambda: blocks() == layers + 1, 5)
    encoder.close()
    return one.on_staged.parcels[1:], staging.memory


def test_what_waits_together_leaves_together():
    (parcel,), memory = together(block_s=1e-6, parcel_bytes=1 << 20, layers=5)
    assert [block.layer for block in parcel.blocks] == list(range(5))
    assert parcel.nbytes == 4 * aligned(SPAN_BYTES) + SPAN_BYTES
    for block, at in parcel.places():
        words = torch.frombuffer(memory.view(parcel.offset + at, block.nbytes), dtype=torch.float32)
        assert (words.abs() == block.layer).all()
        place = {"layer": block.layer, "start": 0, "count": 8, "codec": "raw", "layout": LAYOUT.fingerprint}
        view = memory.view(parcel.offset + at, block.nbytes)
        assert block.digest == block_digest(view, request_id="p", epoch=1, **place)


@pytest.mark.parametrize(
    ("block_s", "parcel_bytes", "sizes"),
    [
        (0.4e-3, 1 << 20, [2, 2, 2]),  # two take 0.8 ms to encode, three would take more than one
        (5e-3, 1 << 20, [1] * 6),  # a block alone always may
        (1e-6, 4 * SPAN_BYTES, [4, 2]),  # the receiver's bound
        (1e-6, 0, [1] * 6),  # a receiver that said nothing
    ],
)
def test_a_parcel_ends_where_encoding_it_takes_long_or_the_receiver_says(block_s, parcel_bytes, sizes):
    parcels, _ = together(block_s=block_s, parcel_bytes=parcel_bytes, layers=6)
    assert [len(parcel.blocks) for parcel in parcels] == sizes


def test_a_parcel_has_so_many_blocks_at_most():
    layout = KVLayout("m", 4 * MOST_BLOCKS, 1, 16, "float32")
    speed = Speed(1e-9, 1e15)
    ratios = Ratios([Candidate("raw", 1.0, speed, speed)])
    encoder, held, route = Encoder(layout, BufferPool(1 << 20), ratios), Held(), Route(ratios)
    route.welcomed(Welcome("d", "gd", parcel_bytes=1 << 20))
    one = Feed(
        Dispatch("p", 1, Coverage(layout.layers, 8), 1e9), ("raw",), "p", route, held,
        on_staged=Staged(), on_idle=lambda: None, on_failed=lambda reason: None,
    )  # fmt: skip
    encoder.add(one)
    push(encoder, one, [layout.layers - 1])
    assert held.entered.wait(5)
    push(encoder, one, range(MOST_BLOCKS + 3))
    held.go.set()
    one.on_staged.wait(3)
    encoder.close()
    assert [len(parcel.blocks) for parcel in one.on_staged.parcels] == [1, MOST_BLOCKS, 3]
