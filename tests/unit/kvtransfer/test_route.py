from __future__ import annotations

import dataclasses
import math

import pytest

from baton.errors import ProtocolError
from kvtransfer.chooser import Ahead, Candidate, Link, Load, Speed
from kvtransfer.link_meter import UNMEASURED
from kvtransfer.protocol import Ack, DecodeSpeed, Probed, Welcome
from kvtransfer.route import Ratios, Route

QUICK, SLOW = Speed(0.0, 1e11), Speed(0.0, 1e7)
HERE = [
    Candidate("raw", 1.0, QUICK, QUICK),
    Candidate("lossless", 1.5, Speed(0.0, 1e9), Speed(0.0, 1e9)),
    Candidate("int8", 2.0, Speed(0.0, 1e9), Speed(0.0, 1e9), loss=1),
]
AHEAD = Ahead(10_000_000, 10)
SPEEDS = tuple(DecodeSpeed(name, 0.0, 1e9) for name in ("raw", "lossless", "int8"))
SLOW_LINK = Probed(1e-4, 1e7)


@pytest.fixture
def route():
    return Route(Ratios(HERE))


def work_s(ratios, codec):
    """What the chooser takes encoding one block of a megabyte to be."""
    return ratios.candidates[codec].encode.seconds(1, 1_000_000)


def pick(route, *allowed):
    """For a handoff of its own."""
    names = [*allowed] or ["raw", "lossless", "int8"]
    return route.pick(tuple(names), AHEAD, Load())


def test_only_what_is_allowed_and_measured_is_chosen(route):
    assert pick(route) == "raw"
    route.welcomed(Welcome("d", "g", SPEEDS, SLOW_LINK))
    assert pick(route) == "int8"
    assert pick(route, "raw", "lossless") == "lossless"
    assert pick(route, "int4") is None
    route.welcomed(Welcome("d", "g", SPEEDS[:2], SLOW_LINK))  # there nobody measured int8
    assert pick(route) == "lossless"


def test_the_receivers_speeds_count_not_this_machines(route):
    slow = (SPEEDS[0], *(DecodeSpeed(one.codec, 0.0, 1e6) for one in SPEEDS[1:]))
    route.welcomed(Welcome("d", "g", slow, SLOW_LINK))
    assert pick(route) == "raw"


def test_acknowledgements_move_the_link_and_the_receivers_load(route):
    route.welcomed(Welcome("d", "g", SPEEDS, Probed(0.0, 1e10)))
    assert pick(route) == "raw"
    for _ in range(12):
        route.acknowledged(Ack("r", 1, 0, fetch_s=0.1, landing=3), 1_000_000)
    assert route.link == Link(pytest.approx(1e7), 0.0)
    assert pick(route) == "int8"


def test_a_decoder_that_lands_for_others_too_counts_as_slow(route):
    slow = (SPEEDS[0], DecodeSpeed("lossless", 0.0, 1.2e7))
    route.welcomed(Welcome("d", "g", slow, Probed(0.0, 1e7)))
    assert pick(route) == "lossless"  # 0.83 s to decode all, against a second for raw's wire
    route.acknowledged(Ack("r", 1, 0, landing=3), 1000)
    assert pick(route) == "raw"


def test_what_every_block_takes_beside_its_codec_makes_codecs_alike():
    ratios = Ratios(HERE)
    route = Route(ratios)
    route.welcomed(Welcome("d", "g", SPEEDS, Probed(0.0, 5e8)))
    assert pick(route, "raw", "lossless") == "lossless"  # 13 ms of wire, where raw has 20
    for _ in range(60):
        ratios.encoded("raw", 1, 1_000_000, 1_000_000, 3e-3)
    assert work_s(ratios, "raw") == pytest.approx(3e-3, rel=0.05)
    assert work_s(ratios, "lossless") == pytest.approx(4e-3, rel=0.05)  # nobody used it
    assert pick(route, "raw", "lossless") == "raw"  # 30 ms to encode anything, or 40
    ratios.encoded("raw", 1, 1_000_000, 1_000_000, 9.0)
    assert work_s(ratios, "raw") < 4e-3  # one block that waited for a core


def test_a_codec_that_is_slower_than_it_was_measured_is_found_out_and_tried_again_later():
    ratios = Ratios(HERE)
    for _ in range(30):
        ratios.encoded("raw", 2, 2_000_000, 2_000_000, 2e-5)  # as measured
        ratios.encoded("lossless", 2, 2_000_000, 1_000_000, 6e-3)  # 3 ms a block instead of one
    assert work_s(ratios, "raw") == pytest.approx(1e-5, rel=0.1)
    assert work_s(ratios, "int8") == pytest.approx(1e-3, rel=0.1)
    assert work_s(ratios, "lossless") == pytest.approx(3e-3, rel=0.15)
    for _ in range(1000):
        ratios.encoded("raw", 2, 2_000_000, 2_000_000, 2e-5)
    assert work_s(ratios, "lossless") == pytest.approx(1e-3, rel=0.15)


def test_a_choice_holds_for_a_few_blocks_of_its_handoff(route):
    one, other = ("raw", "lossless", "int8"), ("raw", "lossless")
    assert route.pick(one, AHEAD, Load()) == "raw"
    route.welcomed(Welcome("d", "g", SPEEDS, SLOW_LINK))
    assert route.pick(one, dataclasses.replace(AHEAD, blocks=7), Load()) == "raw"
    assert route.pick(other, dataclasses.replace(AHEAD, blocks=7), Load()) == "lossless"
    assert route.pick(one, dataclasses.replace(AHEAD, blocks=7), Load()) == "int8"  # another handoff came between
    assert route.pick(one, dataclasses.replace(AHEAD, blocks=3), Load()) == "int8"


def test_what_moving_bytes_takes_one_core_counts_at_either_end(monkeypatch):
    """On a link of 0.5 GB/s raw takes 20 ms, lossless 13 of wire and 10 of work at either end."""
    speeds = (DecodeSpeed("raw", 0.0, 1e11), SPEEDS[1])
    monkeypatch.setattr("kvtransfer.route.cores", lambda: 1.0)
    sending = []
    route = Route(Ratios(HERE, lambda: sending[-1] if sending else None))
    route.welcomed(Welcome("d", "g", speeds, Probed(0.0, 5e8), cores=1.0))
    assert pick(route, "raw", "lossless") == "lossless"
    sending.append(Speed(0.0, 5e8))  # 20 ms of the core to send raw, 13 beside 10 to send lossless
    assert pick(route, "raw", "lossless") == "raw"
    sending.clear()
    assert pick(route, "raw", "lossless") == "lossless"
    for nbytes in (10_000, 10_000, 1_000_000, 1_000_000):
        route.acknowledged(Ack("r", 1, 0, fetch_cpu_s=nbytes / 5e8), nbytes)
    assert pick(route, "raw", "lossless") == "raw"
    route.welcomed(Welcome("d", "g", speeds, cores=8.0))
    assert pick(route, "raw", "lossless") == "lossless"


def test_a_receiver_that_did_not_probe_is_assumed_near(route):
    route.welcomed(Welcome("d", "g"))
    assert route.link == UNMEASURED
    route.acknowledged(Ack("r", 1, 0, landing=-5), 1000)  # neither timed nor plausible
    assert route.link == UNMEASURED


@pytest.mark.parametrize(
    "welcome",
    [
        Welcome("d", "g", (DecodeSpeed("raw", 0.0, 0.0),)),
        Welcome("d", "g", (DecodeSpeed("raw", -1.0, 1e9),)),
        Welcome("d", "g", (DecodeSpeed("raw", 0.0, math.nan),)),
        Welcome("d", "g", SPEEDS, Probed(math.inf, 1e9)),
        Welcome("d", "g", SPEEDS, Probed(0.0, -1.0)),
    ],
)
def test_impossible_speeds_are_refused(route, welcome):
    with pytest.raises(ProtocolError, match="Welcome"):
        route.welcomed(welcome)
    assert pick(route) == "raw"


def test_ratios_follow_what_blocks_really_took():
    ratios = Ratios(HERE)
    route = Route(ratios)
    route.welcomed(Welcome("d", "g", SPEEDS, SLOW_LINK))
    for _ in range(60):
        ratios.encoded("lossless", 1, 1000, 200, 0.0)
    assert ratios.candidates["lossless"].ratio == pytest.approx(5.0, rel=0.02)
    assert pick(route) == "lossless"
    ratios.encoded("never measured", 1, 1000, 100, 1.0)
    assert set(ratios.candidates) == {one.name for one in HERE}


def test_a_ratio_that_hardly_moves_is_left_alone():
    ratios = Ratios(HERE)
    before = dict(ratios.candidates)
    ratios.encoded("lossless", 1, 1500, 1000, 1.5e-6)
    assert ratios.candidates == before
    assert dataclasses.replace(HERE[1]) == before["lossless"]
