"""The state machine, transition by transition."""

from __future__ import annotations

import dataclasses
import re

import pytest

from baton.errors import Overloaded
from baton.layout import KVLayout
from baton.request import TokenEvent
from kvtransfer.coverage import Coverage, Span
from kvtransfer.handoff import Arrived, Bounds, Dispatch, Expired, Landed, Lease, Leases, Limits, Lost
from kvtransfer.protocol import MOST_BLOCKS, Begin, Block, Commit, Complete, Parcel

LAYOUT = KVLayout("m", 2, 1, 8, "float32")
LIMITS = Limits(lease_s=10.0, stall_s=2.0)
FIRST = TokenEvent("r", 0, 42)
BEGIN = Begin("r", 1, 8, "raw")


BOUNDS = Bounds(lambda codec, count: 64, 256)


def block(layer, start=0, count=8, nbytes=64, digest=b"d" * 16):
    return Block(layer, start, count, nbytes, digest)


def parcel(seq, *layers, codec="raw", **changes):
    """Of one block a layer, each of them changed."""
    return Parcel("r", 1, seq, codec, 0, tuple(block(layer, **changes) for layer in layers))


def commit(parcels=2):
    return Commit("r", 1, parcels, FIRST, 0.25, 0.5)


def arrived(seq, fetched_at=1.0, landed_at=2.0):
    return Arrived(seq, 64, fetched_at, landed_at, work_s=0.125)


@pytest.fixture
def lease():
    return Lease("r", 1, layout=LAYOUT, tokens=8, codec="raw", budget_s=100.0, limits=LIMITS, now=0.0)


@pytest.fixture
def sending(lease):
    lease.begin(7, BEGIN, 0.0)
    return lease


def announce(lease, *parcels):
    return [lease.announce(one, 0.0, BOUNDS) for one in parcels]


def test_a_lease_lands_when_the_last_block_does(sending):
    assert announce(sending, parcel(0, 0), parcel(1, 1)) == [True, True]
    sending.landed(arrived(1, fetched_at=3.0, landed_at=9.0), 9.0)
    sending.commit(commit(), 5.0)
    assert sending.outcome is None
    sending.landed(arrived(0, fetched_at=6.0, landed_at=7.0), 9.0)
    assert sending.outcome == Landed(
        FIRST, encode_s=0.25, wire_s=1.0, land_s=3.0, busy_s=0.75, bytes=128, codec_tokens={"raw": 16}
    )


def test_what_landed_before_the_commit_was_hidden(sending):
    announce(sending, parcel(0, 0), parcel(1, 1))
    for seq in (0, 1):
        sending.landed(arrived(seq), 2.0)
    sending.commit(commit(), 5.0)
    assert isinstance(sending.outcome, Landed)
    assert (sending.outcome.wire_s, sending.outcome.land_s) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (parcel(1, 0), "expected 0"),
        (parcel(0, 2), "layer 2 of 2"),
        (parcel(0, -1), "layer -1 of 2"),
        (parcel(0, 0, start=1), r"tokens \[1, 9\) of 8"),
        (parcel(0, 0, count=0), r"tokens \[0, 0\) of 8"),
        (parcel(0, 0, start=-1), r"tokens \[-1, 7\) of 8"),
        (parcel(0, 0, codec="int8"), "codec int8, reserved raw"),
        (parcel(0, 0, nbytes=65), "65 bytes, at most 64"),
        (parcel(0, 0, nbytes=0), "0 bytes"),
        (parcel(0, 0, digest=b"short"), "no digest"),
        (parcel(0), f"0 blocks, at most {MOST_BLOCKS}"),
        (parcel(0, *range(MOST_BLOCKS + 1)), f"{MOST_BLOCKS + 1} blocks, at most"),
        (parcel(0, 0, 0), r"layer 0 overlap"),
        (parcel(0, 0, 1, 0, 1, 0), "320 bytes in 5 blocks, at most 256"),
    ],
)
def test_a_wrong_block_loses_the_handoff(sending, wrong, reason):
    assert announce(sending, wrong) == [False]
    assert isinstance(sending.outcome, Lost)
    assert re.search(reason, sending.outcome.reason)


@pytest.mark.parametrize(("floor", "refused"), [("exact", "int8"), ("int8", "int6"), ("int6", "int2-zstd")])
def test_auto_takes_any_codec_that_the_floor_allows(floor, refused):
    lease = Lease("r", 1, layout=LAYOUT, tokens=8, codec="auto", floor=floor, budget_s=9.0, limits=LIMITS, now=0.0)
    lease.begin(7, dataclasses.replace(BEGIN, codec="auto"), 0.0)
    assert announce(lease, parcel(0, 0, count=3), parcel(1, 0, start=3, count=5, codec="lossless")) == [True, True]
    lease.landed(arrived(1), 1.0)
    lease.landed(arrived(0), 1.0)
    assert announce(lease, parcel(2, 1, codec=refused)) == [False]
    assert lease.outcome is not None
    assert f"codec {refused}, reserved raw, lossless" in lease.outcome.reason


def test_what_landed_says_which_codec_carried_how_much():
    lease = Lease("r", 1, layout=LAYOUT, tokens=8, codec="auto", floor="exact", budget_s=9.0, limits=LIMITS, now=0.0)
    lease.begin(7, dataclasses.replace(BEGIN, codec="auto"), 0.0)
    announce(lease, parcel(0, 0, count=3), parcel(1, 0, start=3, count=5, codec="lossless"), parcel(2, 1))
    lease.commit(commit(3), 0.0)
    for seq in range(3):
        lease.landed(arrived(seq), 1.0)
    assert isinstance(lease.outcome, Landed)
    assert lease.outcome.codec_tokens == {"raw": 11, "lossless": 5}


def test_a_block_needs_a_beginning_and_precedes_the_commit(lease):
    assert announce(lease, parcel(0, 0)) == [False]
    assert lease.outcome == Lost("parcel 0 refused: the handoff has not begun")
    late = Lease("r", 1, layout=LAYOUT, tokens=8, codec="raw", budget_s=9.0, limits=LIMITS, now=0.0)
    late.begin(7, BEGIN, 0.0)
    announce(late, parcel(0, 0), parcel(1, 1))
    late.commit(commit(), 0.0)
    assert announce(late, parcel(2, 0)) == [False]
    assert late.outcome == Lost("parcel 2 refused: it follows the commit")


def test_an_outcome_is_final(sending):
    sending.lose("first")
    sending.begin(8, BEGIN, 1.0)
    sending.commit(commit(), 1.0)
    sending.landed(arrived(0), 1.0)
    sending.tick(1e9)
    sending.lose("second")
    assert announce(sending, parcel(0, 0)) == [False]
    assert sending.outcome == Lost("first")


@pytest.mark.parametrize("begin", [Begin("r", 1, 9, "raw"), Begin("r", 1, 8, "int8")])
def test_what_begins_must_be_what_was_reserved(lease, begin):
    lease.begin(7, begin, 0.0)
    assert isinstance(lease.outcome, Lost)


def test_a_lease_begins_once(sending):
    sending.begin(7, BEGIN, 0.0)
    assert sending.outcome == Lost("begun twice")


def test_a_commit_must_cover_everything(sending):
    announce(sending, parcel(0, 0), parcel(1, 1, count=7))
    sending.commit(commit(), 0.0)
    assert sending.outcome == Lost("commit of 2 parcels refused: 2 announced, 1 (layer, token) pairs missing")


def test_a_block_lands_once(sending):
    announce(sending, parcel(0, 0))
    sending.landed(arrived(0), 1.0)
    sending.landed(arrived(0), 1.0)
    assert sending.outcome == Lost("parcel 0 landed twice")


def test_time_runs_out_in_three_ways(lease):
    lease.tick(9.9)
    assert lease.outcome is None
    lease.tick(10.0)
    assert lease.outcome == Expired("nobody began within 10 s")
    silent = Lease("r", 1, layout=LAYOUT, tokens=8, codec="raw", budget_s=100.0, limits=LIMITS, now=0.0)
    silent.begin(7, BEGIN, 0.0)
    silent.tick(2.5, heard_at=1.0)
    assert silent.outcome is None
    silent.tick(3.0, heard_at=1.0)
    assert silent.outcome == Lost("sender silent for 2.0 s")
    spent = Lease("r", 1, layout=LAYOUT, tokens=8, codec="raw", budget_s=1.0, limits=LIMITS, now=0.0)
    spent.tick(1.0)
    assert spent.outcome == Expired("the request's budget is used up")


def reserve(leases, request_id="r", epoch=1, capacity=2):
    return leases.reserve(request_id, epoch, tokens=8, codec="raw", budget_s=100.0, capacity=capacity, now=0.0)


def test_leases_are_bounded_and_credits_come_back_with_the_outcome():
    leases = Leases(LAYOUT, LIMITS)
    first = reserve(leases, "a")
    reserve(leases, "b")
    with pytest.raises(Overloaded) as refused:
        reserve(leases, "c")
    assert refused.value.retry_after_ms > 0
    first.lose("gone")
    assert leases.active == 1
    reserve(leases, "c")


def test_a_stale_epoch_is_not_reserved_and_finds_nothing():
    leases = Leases(LAYOUT, LIMITS)
    lease = reserve(leases, epoch=3)
    with pytest.raises(ValueError, match="epoch 4 after epoch 3"):
        reserve(leases, epoch=4)
    with pytest.raises(ValueError, match="under way"):
        leases.forget(lease)
    assert leases.find("r", 2, peer=7) is None
    assert leases.find("r", 3, peer=7) is lease
    lease.begin(7, BEGIN, 0.0)
    assert leases.find("r", 3, peer=8) is None
    lease.lose("gone")
    with pytest.raises(ValueError, match="epoch 3 after epoch 3"):
        reserve(leases, epoch=3)
    newer = reserve(leases, epoch=4)
    leases.forget(lease)
    assert leases.find("r", 4, peer=7) is newer
    newer.lose("gone")
    leases.forget(newer)
    assert leases.find("r", 4, peer=7) is None


def test_a_sign_of_life_renews_only_that_peers_leases():
    leases = Leases(LAYOUT, LIMITS)
    mine, other = reserve(leases, "a"), reserve(leases, "b")
    mine.begin(1, BEGIN, 0.0)
    other.begin(2, BEGIN, 0.0)
    leases.hear(1, 2.0)
    assert leases.tick(2.5) == [other]
    assert leases.of_peer(1) == [mine]
    assert leases.of_peer(2) == []
    leases.gone(1)
    assert leases.tick(3.0) == [mine]


@pytest.fixture
def dispatch():
    return Dispatch("r", 1, Coverage(2, 8), expires_at=100.0)


def push_all(dispatch):
    assert dispatch.push(Span(0, 0, 8))
    assert dispatch.push(Span(1, 0, 8))


def test_a_dispatch_commits_once_everything_is_staged_and_told(dispatch):
    push_all(dispatch)
    assert dispatch.staged(1, work_s=0.5, now=1.0) == 0
    assert dispatch.commit(1) is None
    dispatch.finish(FIRST, 2.0)
    assert dispatch.commit(1) is None
    assert dispatch.staged(1, work_s=0.5, now=3.0) == 1
    assert dispatch.commit(1) is None
    assert dispatch.commit(2) == Commit("r", 1, 2, FIRST, 1.0, 1.0)
    assert dispatch.commit(2) is None
    assert dispatch.ack(0)
    assert dispatch.ack(1)
    dispatch.complete(Complete("r", 1, 0.1, 0.2, 0.3, 99))
    assert dispatch.outcome == Landed(FIRST, 1.0, 0.1, 0.2, 0.3, 99)
    assert not dispatch.push(Span(0, 0, 8))
    dispatch.finish(FIRST, 9.0)
    dispatch.complete(Complete("r", 1, 0, 0, 0, 0))
    dispatch.tick(1e9)
    dispatch.lose("late")
    assert isinstance(dispatch.outcome, Landed)


def test_encoding_that_ends_before_the_first_token_is_hidden(dispatch):
    push_all(dispatch)
    for now in (1.0, 2.0):
        dispatch.staged(1, work_s=0.5, now=now)
    dispatch.finish(FIRST, 3.0)
    committed = dispatch.commit(2)
    assert committed is not None
    assert (committed.encode_exposed_s, committed.encode_busy_s) == (0.0, 1.0)


def test_a_push_that_breaks_the_coverage_loses_the_handoff(dispatch):
    push_all(dispatch)
    assert not dispatch.push(Span(1, 7, 1))
    assert dispatch.outcome == Lost("push refused: tokens [7, 8) of layer 1 overlap ones already sent")


def test_nothing_follows_the_last_push(dispatch):
    push_all(dispatch)
    dispatch.finish(FIRST, 0.0)
    assert not dispatch.push(Span(0, 0, 1))
    assert dispatch.outcome == Lost("push refused: it follows the last one")


def test_finishing_early_or_twice_loses_the_handoff(dispatch):
    dispatch.push(Span(0, 0, 8))
    dispatch.finish(FIRST, 0.0)
    assert "8 (layer, token) pairs never pushed" in dispatch.outcome.reason
    twice = Dispatch("r", 1, Coverage(2, 8), expires_at=100.0)
    push_all(twice)
    twice.finish(FIRST, 0.0)
    twice.finish(FIRST, 0.0)
    assert isinstance(twice.outcome, Lost)


def test_an_answer_that_does_not_fit_loses_the_handoff(dispatch):
    push_all(dispatch)
    dispatch.staged(1, work_s=0.0, now=0.0)
    assert not dispatch.ack(1)
    assert "not outstanding" in dispatch.outcome.reason
    early = Dispatch("r", 1, Coverage(2, 8), expires_at=100.0)
    early.complete(Complete("r", 1, 0, 0, 0, 0))
    assert isinstance(early.outcome, Lost)


def test_a_dispatch_expires(dispatch):
    dispatch.tick(99.0)
    assert dispatch.outcome is None
    dispatch.tick(100.0)
    assert isinstance(dispatch.outcome, Expired)


def test_chunks_may_come_in_any_order_and_close_every_gap():
    coverage = Coverage(1, 10)
    for start, count in ((0, 2), (4, 2), (8, 2), (6, 2), (2, 2)):
        assert coverage.add(Span(0, start, count)) == ""
    assert coverage.missing == 0
    assert "overlap" in coverage.add(Span(0, 5, 1))
