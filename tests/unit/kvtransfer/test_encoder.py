from __future__ import annotations

import threading

import pytest
import torch

from baton.layout import KVLayout
from kvtransfer.arena import BufferPool
from kvtransfer.coverage import Coverage, Span
from kvtransfer.encoder import Encoder, Feed
from kvtransfer.handoff import Dispatch, Lost
from kvtransfer.protocol import Acks
from kvtransfer.route import Ratios, Route

LAYOUT = KVLayout("m", 64, 1, 16, "float32")  # 128 bytes a token and layer
RATIOS = Ratios([])
SPAN_BYTES = 8 * LAYOUT.layer_token_bytes


class Staged:
    """The blocks that a feed announced, for a test to wait on."""

    def __init__(self):
        self.blocks, self.changed = [], threading.Condition()

    def __call__(self, block):
        with self.changed:
            self.blocks.append(block)
            self.changed.notify_all()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.blocks) >= count, 5), f"{len(self.blocks)} of {count}"


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
        encoder.acknowledge(quick, Acks("quick", 1, (seq,)))
    assert len(silent.on_staged.blocks) == 4  # half of the staging
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
    assert slow.on_staged.blocks == []
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
    assert [(block.start, block.count) for block in big.on_staged.blocks] == [(0, 128), (128, 128), (256, 44)]
    encoder.drop(big)
    encoder.close()


def test_prefill_goes_on_at_its_pace_from_push_to_push(encoder):
    """Not up to now: until then the encoder may have been at work, and not prefill."""
    coverage = Coverage(LAYOUT.layers, 8)
    made = Feed(
        Dispatch("r", 1, coverage, 1e9), ("raw",), "p", Route(RATIOS), lambda *_: None,
        on_staged=lambda block: None, on_idle=lambda: None, on_failed=lambda reason: None,
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
