"""What no choice may break, whatever was measured."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config_handoff import FLOORS, LOSS, codecs_within
from kvtransfer.chooser import Ahead, Candidate, Link, Load, Speed, choose, estimate

SLACK = 1 + 1e-9  # of floating point
speeds = st.builds(Speed, st.floats(0.0, 1e-3), st.floats(1e7, 1e12))
shares = st.integers(1, 20)
loads = st.builds(Load, shares, shares, shares)
bandwidths = st.floats(1e4, 1e12)
aheads = st.builds(
    Ahead,
    raw_bytes=st.integers(1, 10**10),
    blocks=st.integers(1, 5000),
    backlog_bytes=st.integers(0, 10**9),
    prefill_s=st.floats(0.0, 100.0),
    slack_s=st.floats(0.0, 1000.0) | st.just(float("inf")),
)


@st.composite
def tables(draw):
    """Codecs within some floor. Raw is what raw is: no smaller, and no stage of any other is faster."""
    raw = Candidate("raw", 1.0, Speed(0.0, 1e12), Speed(0.0, 1e12))
    names = draw(st.lists(st.sampled_from(codecs_within("int2")[1:]), unique=True, max_size=8))
    rest = [Candidate(name, draw(st.floats(0.9, 16.0)), draw(speeds), draw(speeds), LOSS[name]) for name in names]
    return [raw, *rest]


@given(tables(), bandwidths, st.floats(0.0, 0.1), aheads, loads)
def test_no_choice_is_slower_than_raw_or_than_its_price_allows(table, bytes_per_s, latency_s, ahead, load):
    choice = choose(table, Link(bytes_per_s, latency_s), ahead, load)
    raw, fastest = choice.estimates[0], min(one.total_s for one in choice.estimates)
    assert choice.best.total_s <= raw.total_s * SLACK
    assert choice.best.total_s <= fastest * 1.06 * SLACK
    assert choice.best in choice.estimates
    if fastest <= ahead.slack_s:
        assert choice.best.total_s <= ahead.slack_s


def costlier(one: Candidate, other: Candidate, ahead: Ahead) -> bool:
    """``one`` compresses more and is as slow or slower to encode and to decode."""
    n, raw = ahead.blocks, ahead.raw_bytes
    return (
        one.ratio > other.ratio
        and one.encode.seconds(n, raw) >= other.encode.seconds(n, raw)
        and one.decode.seconds(n, raw) >= other.decode.seconds(n, raw)
    )


@settings(max_examples=500)
@given(tables(), st.tuples(bandwidths, bandwidths), st.floats(0.0, 0.1), aheads, loads)
def test_a_faster_link_never_takes_more_compression_for_more_work(table, both, latency_s, ahead, load):
    """Unless it affords a less lossy codec."""
    slow, fast = (choose(table, Link(at, latency_s), ahead, load) for at in sorted(both))
    before, after = slow.best.codec, fast.best.codec
    if after.loss >= before.loss and costlier(after, before, ahead):
        # Only where rounding decides between two that are alike.
        link = Link(max(both), latency_s)
        scores = [estimate(codec, link, ahead, load).score for codec in (before, after)]
        assert scores[0] <= scores[1] * SLACK


@given(st.sampled_from(FLOORS), bandwidths, aheads)
def test_never_below_the_floor(floor, bytes_per_s, ahead):
    everything = [Candidate(name, 1.0 + i, Speed(0.0, 1e10), Speed(0.0, 1e10), LOSS[name])
                  for i, name in enumerate(codecs_within("int2"))]  # fmt: skip
    allowed = codecs_within(floor)
    choice = choose([one for one in everything if one.name in allowed], Link(bytes_per_s, 0.0), ahead)
    assert LOSS[choice.codec] <= FLOORS.index(floor)


@given(tables(), bandwidths, st.floats(0.0, 0.1), aheads, loads)
def test_stages_are_bounds(table, bytes_per_s, latency_s, ahead, load):
    """No faster than the slowest stage, nor than prefill; no slower than one after the other."""
    for one in choose(table, Link(bytes_per_s, latency_s), ahead, load).estimates:
        stages = (one.encode_s, one.wire_s, one.decode_s)
        backlog_s = ahead.backlog_bytes / bytes_per_s
        assert one.total_s * SLACK >= max(*stages, ahead.prefill_s, backlog_s)
        assert one.total_s <= (sum(stages) + ahead.prefill_s + backlog_s) * SLACK
        assert one.exposed_s >= 0.0
