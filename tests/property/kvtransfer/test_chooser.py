"""What no choice may break, whatever was measured."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config_handoff import FLOORS, LOSS, codecs_within
from kvtransfer.chooser import Ahead, Candidate, Ends, Estimate, Link, Load, Speed, choose, estimate

SLACK = 1 + 1e-9  # of floating point
speeds = st.builds(Speed, st.floats(0.0, 1e-3), st.floats(1e7, 1e12))
shares = st.integers(1, 20)
loads = st.builds(Load, shares, shares, shares)
bandwidths = st.floats(1e4, 1e12)
links = st.builds(Link, bandwidths, st.floats(0.0, 0.1))
aheads = st.builds(
    Ahead,
    raw_bytes=st.integers(1, 10**10),
    blocks=st.integers(1, 5000),
    backlog_bytes=st.integers(0, 10**9),
    prefill_s=st.floats(0.0, 100.0),
    slack_s=st.floats(0.0, 1000.0) | st.just(float("inf")),
    together_s=st.sampled_from([0.0, 1e-3]),
)
moving = st.builds(Speed, st.floats(0.0, 1e-3), st.floats(1e7, 1e12))
cores = st.floats(0.1, 64.0) | st.just(float("inf"))
everyones_ends = st.builds(Ends, moving, moving, cores, cores)


@st.composite
def tables(draw):
    """Codecs within some floor. Raw is what raw is: no smaller, and no stage of any other is faster."""
    raw = Candidate("raw", 1.0, Speed(0.0, 1e12), Speed(0.0, 1e12))
    names = draw(st.lists(st.sampled_from(codecs_within("int2")[1:]), unique=True, max_size=8))
    rest = [Candidate(name, draw(st.floats(0.9, 16.0)), draw(speeds), draw(speeds), LOSS[name]) for name in names]
    return [raw, *rest]


@given(tables(), links, aheads, loads, everyones_ends)
def test_no_choice_is_slower_than_raw_or_than_its_price_allows(table, link, ahead, load, ends):
    choice = choose(table, link, ahead, load, ends=ends)
    raw, fastest = choice.estimates[0], min(one.total_s for one in choice.estimates)
    assert choice.best.total_s <= raw.total_s * SLACK
    assert choice.best.total_s <= fastest * 1.06 * SLACK
    assert choice.best in choice.estimates
    if fastest <= ahead.slack_s:
        assert choice.best.total_s <= ahead.slack_s


def costlier(one: Estimate, other: Estimate) -> bool:
    """``one`` compresses more, and is as much or more work for encoder, decoder and both ends."""
    return (
        one.codec.ratio > other.codec.ratio
        and one.encode_s >= other.encode_s
        and one.decode_s >= other.decode_s
        and one.sender_s >= other.sender_s
        and one.receiver_s >= other.receiver_s
    )


@settings(max_examples=500)
@given(tables(), st.tuples(links, bandwidths), aheads, loads, everyones_ends)
def test_a_faster_link_never_takes_more_compression_for_more_work(table, both, ahead, load, ends):
    """Unless it affords a less lossy codec; a fetch for each block, so that no codec has more fetches to wait for."""
    ahead = dataclasses.replace(ahead, together_s=0.0)
    rates, latency_s = (both[0].bytes_per_s, both[1]), both[0].latency_s
    slow, fast = (choose(table, Link(at, latency_s), ahead, load, ends=ends) for at in sorted(rates))
    before, after = slow.best, fast.best
    if after.codec.loss >= before.codec.loss and costlier(after, before):
        # Only where rounding decides between two that are alike.
        link = Link(max(rates), latency_s)
        scores = [estimate(one.codec, link, ahead, load, ends=ends).score for one in (before, after)]
        assert scores[0] <= scores[1] * SLACK


@given(st.sampled_from(FLOORS), bandwidths, aheads)
def test_never_below_the_floor(floor, bytes_per_s, ahead):
    everything = [Candidate(name, 1.0 + i, Speed(0.0, 1e10), Speed(0.0, 1e10), LOSS[name])
                  for i, name in enumerate(codecs_within("int2"))]  # fmt: skip
    allowed = codecs_within(floor)
    choice = choose([one for one in everything if one.name in allowed], Link(bytes_per_s, 0.0), ahead)
    assert LOSS[choice.codec] <= FLOORS.index(floor)


@given(tables(), links, aheads, loads, everyones_ends)
def test_stages_are_bounds(table, link, ahead, load, ends):
    """No faster than the slowest stage, nor than prefill or what waits already; no slower than one after the other, and
    then the work of both ends."""
    for one in choose(table, link, ahead, load, ends=ends).estimates:
        stages, ends_s = (one.encode_s, one.wire_s, one.decode_s), (one.sender_s, one.receiver_s)
        backlog_s = ahead.backlog_bytes / link.bytes_per_s
        queued_s = [
            ahead.backlog_bytes / (moving.bytes_per_s * cores)
            for moving, cores in ((ends.send, ends.sender_cores), (ends.fetch, ends.receiver_cores))
        ]
        assert one.total_s * SLACK >= max(*stages, ahead.prefill_s, backlog_s, *queued_s)
        assert one.total_s <= (sum(stages) + ahead.prefill_s + backlog_s + sum(ends_s) + sum(queued_s)) * SLACK
        assert one.exposed_s >= 0.0


@given(tables(), links, aheads, loads, everyones_ends)
def test_more_cores_or_bandwidth_never_cost_time(table, link, ahead, load, ends):
    more = dataclasses.replace(ends, sender_cores=2 * ends.sender_cores, receiver_cores=2 * ends.receiver_cores)
    faster = Link(2 * link.bytes_per_s, link.latency_s)
    for codec in table:
        slow = estimate(codec, link, ahead, load, ends=ends).total_s
        assert estimate(codec, link, ahead, load, ends=more).total_s <= slow * SLACK
        assert estimate(codec, faster, ahead, load, ends=ends).total_s <= slow * SLACK
