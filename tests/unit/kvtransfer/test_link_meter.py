from __future__ import annotations

import math
import random

import pytest

from kvtransfer.chooser import Link, Speed
from kvtransfer.link_meter import MEMORY, OF_A_SIZE, PROBE_BYTES, UNMEASURED, LinkMeter, WorkMeter


def fetch(meter, link, *sizes):
    for nbytes in sizes:
        meter.fetched(nbytes, link.latency_s + nbytes / link.bytes_per_s)


def same(link, bytes_per_s, latency_s):
    return (link.bytes_per_s, link.latency_s) == (pytest.approx(bytes_per_s), pytest.approx(latency_s, abs=1e-9))


def test_before_anything_was_fetched_nothing_speaks_for_compressing():
    assert LinkMeter().link() == UNMEASURED


def test_a_probe_is_believed_until_blocks_say_more():
    meter = LinkMeter()
    meter.probed(Link(1e8, 2e-3))
    assert same(meter.link(), 1e8, 2e-3)
    fetch(meter, Link(1e9, 2e-3), *[PROBE_BYTES] * OF_A_SIZE)
    assert same(meter.link(), 1e9, 2e-3)


def test_sizes_tell_latency_from_bandwidth():
    meter = LinkMeter()
    meter.probed(Link(1e9, 1e-5))  # a wrong latency
    fetch(meter, Link(1e8, 5e-3), *[100_000, 800_000] * 6)
    assert same(meter.link(), 1e8, 5e-3)


def test_alike_sizes_leave_the_latency_to_the_probe():
    meter = LinkMeter()
    meter.probed(Link(1e9, 1e-3))
    fetch(meter, Link(2e8, 1e-3), *[500_000] * OF_A_SIZE)
    assert same(meter.link(), 2e8, 1e-3)


def test_a_thread_that_lost_its_core_is_no_slow_link():
    meter, link = LinkMeter(), Link(1e9, 0.0)
    meter.probed(link)
    for late in range(OF_A_SIZE):
        fetch(meter, link, 1_000_000)
        if late % 3 == 0:
            meter.fetched(1_000_000, 0.5)
    assert meter.link().bytes_per_s == pytest.approx(1e9, rel=0.05)


def test_a_link_that_moves_is_followed_within_half_a_dozen_fetches():
    meter = LinkMeter()
    fetch(meter, Link(1e9, 1e-4), *[1_000_000] * 40)
    fetch(meter, Link(1e8, 1e-4), *[1_000_000] * (OF_A_SIZE // 2 + 1))
    assert meter.link().bytes_per_s < 1.2e8
    fetch(meter, Link(1e9, 1e-4), *[1_000_000] * (OF_A_SIZE // 2 + 1))
    assert meter.link().bytes_per_s > 0.8e9


def test_many_small_fetches_between_pauses_do_not_hide_what_a_shaped_link_sustains():
    """A token bucket: what fits it crosses as if the link were not shaped."""
    meter = LinkMeter()
    fetch(meter, Link(1e8, 1e-4), *[4_000_000] * 4)
    fetch(meter, Link(1e10, 1e-4), *[100_000, 150_000] * 100)
    assert meter.link().bytes_per_s == pytest.approx(1e8, rel=0.05)


def test_what_was_long_ago_is_forgotten():
    meter = LinkMeter()
    fetch(meter, Link(1e8, 1e-4), *[4_000_000] * 4)
    fetch(meter, Link(1e10, 1e-4), *[100_000] * (MEMORY + 1))
    assert meter.link().bytes_per_s > 5e8


def test_the_work_of_moving_bytes_is_each_fetchs_and_each_bytes():
    meter = WorkMeter()
    assert meter.cost() is None
    meter.took(1000, 0.0)  # too little for the clock
    assert meter.cost() is None
    for nbytes in (100_000, 100_000, 1_000_000, 1_000_000):
        meter.took(nbytes, 1e-4 + nbytes / 1e9)
    assert meter.cost() == Speed(pytest.approx(1e-4), pytest.approx(1e9))


@pytest.mark.parametrize(("nbytes", "seconds"), [(0, 1.0), (5, 0.0), (5, -1.0), (5, math.nan), (5, math.inf)])
def test_nonsense_is_ignored(nbytes, seconds):
    meter = LinkMeter()
    meter.fetched(nbytes, seconds)
    assert meter.link() == UNMEASURED


def test_small_blocks_that_took_longer_than_large_ones_say_nothing_of_latency():
    meter = LinkMeter()
    meter.probed(Link(1e9, 1e-4))
    for _ in range(6):
        meter.fetched(10_000, 5e-3)
        meter.fetched(1_000_000, 1.1e-3)
    assert same(meter.link(), 1e9, 1e-4)


def test_fetches_faster_than_the_clock_are_no_division_by_zero():
    meter = LinkMeter()
    meter.probed(Link(1e12, 1e-3))
    fetch(meter, Link(math.inf, 1e-9), *[1000] * OF_A_SIZE)
    assert math.isfinite(meter.link().bytes_per_s)


def test_any_fetches_give_a_finite_link():
    draw = random.Random(3)
    meter = LinkMeter()
    for _ in range(2000):
        meter.fetched(draw.choice((1, 10, 10**6)), 10 ** draw.uniform(-9, 3))
        link = meter.link()
        assert 0.0 < link.bytes_per_s < math.inf
        assert 0.0 <= link.latency_s < math.inf
