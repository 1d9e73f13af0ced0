"""The choice on tables small enough to reckon by hand: one block or ten, speeds in round numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest

from kvtransfer.chooser import Ahead, Candidate, Ends, Link, Load, Regime, Speed, choose, estimate, pays_below, regimes

FREE = Speed(0.0, 1e12)
RAW = Candidate("raw", 1.0, FREE, FREE)
HALF = Candidate("lossless", 2.0, Speed(0.0, 1e9), Speed(0.0, 2e9))
INT8 = Candidate("int8", 4.0, Speed(0.0, 4e9), Speed(0.0, 4e9), loss=1)
TEN_MB = Ahead(raw_bytes=10_000_000, blocks=10)
GIGABIT, FAST = Link(125e6, 0.0), Link(10e9, 0.0)


def total_s(codec, link=GIGABIT, ahead=TEN_MB, load=Load()):  # noqa: B008
    return estimate(codec, link, ahead, load).total_s


def test_one_block_passes_the_stages_one_after_the_other():
    one = estimate(HALF, Link(1e9, 1e-3), Ahead(1_000_000, 1), Load())
    assert (one.encode_s, one.wire_s, one.decode_s) == pytest.approx((1e-3, 1.5e-3, 0.5e-3))
    assert one.total_s == one.exposed_s == pytest.approx(3e-3)
    assert one.bottleneck == "wire"


def test_many_blocks_wait_for_the_slowest_stage_only():
    # 80 ms on the wire raw; compressed 40 ms, of which nine blocks wait and one passes 10 + 5 ms of work / 10 as well.
    assert total_s(RAW) == pytest.approx(80e-3, rel=1e-3)
    assert total_s(HALF) == pytest.approx(0.9 * 40e-3 + (10e-3 + 40e-3 + 5e-3) / 10)
    assert estimate(HALF, FAST, TEN_MB, Load()).bottleneck == "encode"
    assert total_s(HALF, FAST) == pytest.approx(0.9 * 10e-3 + (10e-3 + 0.5e-3 + 5e-3) / 10)


def test_what_prefill_hides_costs_nothing():
    hidden = dataclasses.replace(TEN_MB, prefill_s=1.0)
    raw = estimate(RAW, GIGABIT, hidden, Load())
    assert raw.total_s == pytest.approx(1.0 + 8e-3, rel=1e-3)  # the last block alone
    assert raw.exposed_s == pytest.approx(8e-3, rel=1e-2)


def test_blocks_that_prefill_brings_one_by_one_are_fetched_one_by_one():
    quick = Candidate("raw", 1.0, Speed(0.0, 10e9), FREE)
    shared = dataclasses.replace(TEN_MB, together_s=1e-3)  # all ten are encoded within it
    assert total_s(quick, FAST, shared) == pytest.approx(2e-3, rel=1e-2)  # one fetch, which passes as a whole
    hidden = dataclasses.replace(shared, prefill_s=1.0)
    assert total_s(quick, FAST, hidden) == pytest.approx(1.0 + 0.2e-3, rel=1e-5)  # the last block alone
    assert choose([quick, HALF], FAST, hidden, Load()).codec == "raw"


def test_what_is_queued_for_the_wire_delays_every_codec():
    behind = dataclasses.replace(TEN_MB, backlog_bytes=12_500_000)
    assert total_s(RAW, ahead=behind) - total_s(RAW) == pytest.approx(0.1)
    assert total_s(HALF, ahead=behind) - total_s(HALF) == pytest.approx(0.1)


def test_latency_is_paid_for_every_block():
    assert total_s(RAW, Link(125e6, 2e-3)) - total_s(RAW) == pytest.approx(20e-3)


def test_a_shared_stage_takes_longer():
    one, busy = estimate(HALF, GIGABIT, TEN_MB, Load()), estimate(HALF, GIGABIT, TEN_MB, Load(2, 3, 4))
    assert (busy.encode_s, busy.wire_s, busy.decode_s) == pytest.approx(
        (2 * one.encode_s, 3 * one.wire_s, 4 * one.decode_s)
    )


def test_raw_on_a_fast_link_and_compressed_on_a_slow_one():
    assert choose([RAW, HALF], FAST, TEN_MB).codec == "raw"
    assert choose([RAW, HALF], GIGABIT, TEN_MB).codec == "lossless"
    assert choose([RAW, HALF, INT8], GIGABIT, TEN_MB).codec == "int8"


def test_blocks_that_are_encoded_quickly_share_fetches():
    slow, quick = (dataclasses.replace(HALF, encode=Speed(0.0, rate)) for rate in (1e9, 4e9))  # 1 and 0.25 ms a block
    together = dataclasses.replace(TEN_MB, together_s=1.1e-3)
    link = Link(1e9, 1e-3)
    assert estimate(slow, link, together, Load()).wire_s == pytest.approx(10e-3 + 5e-3)
    one = estimate(quick, link, together, Load())
    assert one.wire_s == pytest.approx(3e-3 + 5e-3)  # fetches of four, four and two
    assert one.total_s == pytest.approx((2.5e-3 + 8e-3 + 5e-3) / 3 + 8e-3 * 2 / 3)


def test_an_end_with_one_core_does_its_stages_one_after_the_other():
    ends = Ends(send=Speed(0.0, 1e9), fetch=Speed(1e-3, 1e9), sender_cores=1.0, receiver_cores=1.0)
    one = estimate(HALF, FAST, TEN_MB, Load(), ends=ends)
    assert one.sender_s == pytest.approx(10e-3 + 5e-3)  # to encode 10 MB, and to send 5
    assert one.receiver_s == pytest.approx(5e-3 + 10 * 1e-3 + 5e-3)  # to decode them, ten fetches, and 5 MB of them
    assert one.total_s == pytest.approx((10e-3 + 0.5e-3 + 5e-3) / 10 + 0.9 * 20e-3)
    assert one.bottleneck == "work of the receiver"
    two = estimate(HALF, FAST, TEN_MB, Load(), ends=dataclasses.replace(ends, sender_cores=2.0, receiver_cores=2.0))
    assert two.total_s == pytest.approx(1.55e-3 + 0.9 * 10e-3)  # encoding alone takes as long


def test_what_waits_already_is_work_for_both_ends_too():
    ends = Ends(send=Speed(0.0, 1e9), fetch=Speed(0.0, 1e8), sender_cores=1.0, receiver_cores=2.0)
    behind = dataclasses.replace(TEN_MB, backlog_bytes=100_000_000)
    some, more = (estimate(HALF, FAST, ahead, Load(), ends=ends).total_s for ahead in (TEN_MB, behind))
    assert more - some == pytest.approx(0.5, rel=0.01)  # a second of the receiver's processors, of which it has two


def test_one_core_prefers_raw_where_compressing_is_more_work_than_sending():
    ends = Ends(send=Speed(0.0, 1e9), fetch=Speed(0.0, 1e9), sender_cores=1.0, receiver_cores=1.0)
    link = Link(0.8e9, 0.0)
    assert choose([RAW, HALF], link, TEN_MB).codec == "lossless"
    choice = choose([RAW, HALF], link, TEN_MB, ends=ends)
    assert choice.codec == "raw"
    assert choice.why().endswith("next is lossless with 15.6 ms, most of it work of the sender")
    assert choose([RAW, HALF], GIGABIT, TEN_MB, ends=ends).codec == "lossless"


def test_compressing_does_not_pay_where_the_encoder_is_shared():
    link = Link(1.2e9, 0.0)
    assert choose([RAW, HALF], Link(0.8e9, 0.0), TEN_MB).codec == "lossless"
    assert choose([RAW, HALF], Link(0.8e9, 0.0), TEN_MB, Load(encode=4)).codec == "raw"
    assert choose([RAW, HALF], link, TEN_MB, Load(wire=4)).codec == "lossless"


def test_a_step_down_the_floors_has_its_price():
    barely = dataclasses.replace(HALF, name="int8", ratio=2.01, loss=1)
    choice = choose([RAW, HALF, barely], GIGABIT, TEN_MB)
    assert choice.codec == "lossless"
    assert choice.why().endswith("too little gained for its loss")


def test_the_deadline_comes_before_quality():
    barely = dataclasses.replace(HALF, name="int8", ratio=2.01, loss=1)
    slack_s = (total_s(HALF) + total_s(barely)) / 2
    choice = choose([RAW, HALF, barely], GIGABIT, dataclasses.replace(TEN_MB, slack_s=slack_s))
    assert choice.codec == "int8"
    assert "lossless" in choice.why()
    assert choice.why().endswith("which misses the deadline")


def test_out_of_reach_the_fastest_is_taken_and_said_so():
    barely = dataclasses.replace(HALF, name="int8", ratio=2.01, loss=1)
    choice = choose([RAW, HALF, barely], GIGABIT, dataclasses.replace(TEN_MB, slack_s=1e-3))
    assert choice.codec == "int8"
    assert choice.why().endswith("the deadline in 1 ms is out of reach")


def test_a_choice_says_why():
    choice = choose([RAW, HALF], GIGABIT, TEN_MB)
    assert choice.why() == "lossless exposes 41.5 ms, most of it wire; next is raw with 80 ms, most of it wire"
    assert choose([RAW], FAST, TEN_MB).why() == "raw exposes 1 ms, most of it wire"
    assert [one.codec.name for one in choice.estimates] == ["raw", "lossless"]


def test_regimes_end_where_the_next_one_is_as_good():
    found = regimes([RAW, HALF, INT8], 0.0, TEN_MB)
    assert [one.codec for one in found] == ["int8", "raw"]
    edge = found[0].below_bytes_per_s
    assert found[1] == Regime("raw", math.inf)
    at = [estimate(codec, Link(edge, 0.0), TEN_MB, Load()).score for codec in (RAW, INT8)]
    assert at[0] == pytest.approx(at[1], rel=1e-6)


def test_a_codec_pays_below_a_bandwidth_or_never_or_always():
    edge = pays_below(HALF, RAW, 0.0, TEN_MB)
    assert total_s(HALF, Link(edge, 0.0)) == pytest.approx(total_s(RAW, Link(edge, 0.0)))
    assert total_s(HALF, Link(0.9 * edge, 0.0)) < total_s(RAW, Link(0.9 * edge, 0.0))
    assert pays_below(dataclasses.replace(HALF, ratio=0.9), RAW, 0.0, TEN_MB) == 0.0
    slow_raw = dataclasses.replace(RAW, encode=Speed(0.0, 1e6))
    assert pays_below(dataclasses.replace(HALF, encode=FREE, decode=FREE), slow_raw, 0.0, TEN_MB) == math.inf
