"""Two thousand handoffs open at once over one connection, and a request of one GiB, over every transport."""

from __future__ import annotations

import signal

import pytest

from kvtransfer.handoff import Landed, Lost

HANDOFFS, TOKENS = 2000, 3
GIB_TOKENS = 8192


def test_two_thousand_handoffs_at_once_over_one_connection(wide_pair):
    pair = wide_pair
    tickets = pair.decode.answer(pair.decode.start("reserve_many", HANDOFFS, TOKENS), timeout_s=60)
    assert pair.decode_held()[0] == HANDOFFS
    pair.prefill.answer(pair.prefill.start("send_many", tickets, TOKENS), timeout_s=60)
    assert pair.decode.answer(pair.decode.start("land_many", HANDOFFS, TOKENS), timeout_s=120) == HANDOFFS
    pair.idle()


@pytest.mark.slow
def test_a_request_of_one_gib_passes_through_small_buffers(large_pair):
    pair = large_pair
    ticket = pair.decode.call("reserve_pattern", "gib", GIB_TOKENS)
    pair.prefill.call("send_pattern", ticket, GIB_TOKENS, 512)
    landed = pair.decode.answer(pair.decode.start("received", "gib"), timeout_s=120)
    assert isinstance(landed, Landed), landed
    assert landed.bytes == 1 << 30
    assert pair.decode.call("pattern_is_exact")
    pair.decode.call("release", "gib")
    pair.idle()


@pytest.mark.parametrize("mortal_pair", ["tcp"], indirect=True)  # staging is the same before every transport
def test_a_stopped_receiver_fills_the_staging_and_holds_up_no_engine(mortal_pair):
    pair = mortal_pair
    assert isinstance(pair.hand_over("warm"), Landed)
    ticket = pair.decode.call("reserve", "r", tokens=60_000)  # 120 MB of KV; the staging holds 8
    pair.decode.signal(signal.SIGSTOP)
    slowest_s = pair.prefill.call("send_pattern", ticket, 60_000, 512)
    pair.until(lambda: pair.prefill_held()[1] > 6 << 20, 5)
    encoded = pair.prefill.start("encoded", "r")
    assert not pair.prefill.has_answered(encoded)  # its pages are held: an engine that is out of them admits nothing
    assert pair.prefill_held()[1] <= 8 << 20
    assert slowest_s < 0.1  # the engine's thread, which the staging never makes wait
    assert isinstance(pair.prefill.call("sent", "r"), Lost)
    pair.prefill.answer(encoded)  # and now the pages are free
    pair.until(lambda: pair.prefill_held() == (0, 0), 2)
    pair.decode.signal(signal.SIGCONT)
