"""What every transport promises, between two real processes (one for loopback)."""

from __future__ import annotations

import signal
import time

import pytest

from kvtransfer.handoff import Expired, Landed, Lost


def test_kv_crosses_bit_exact_between_different_page_sizes(pair):
    for codec in ("raw", "lossless"):
        ticket = pair.decode.call("reserve", codec, tokens=333, codec=codec, page_tokens=16)
        pair.prefill.call("send", ticket, 5, tokens=333, page_tokens=7, chunk=100)
        landed = pair.decode.call("received", codec)
        assert isinstance(landed, Landed), landed
        assert landed.first.token == 5
        assert min(landed.encode_s, landed.wire_s, landed.land_s) >= 0 < landed.busy_s
        assert pair.decode.call("matches", codec, 5)
        sent = pair.prefill.call("sent", codec)
        assert (sent.bytes, sent.wire_s, sent.first) == (landed.bytes, landed.wire_s, landed.first)
        pair.decode.call("release", codec)
    assert pair.decode.call("receiver_stats").transport == pair.transport.partition("-")[0]


def test_int8_crosses_within_its_error(pair):
    assert isinstance(pair.hand_over("r", codec="int8"), Landed)
    assert pair.decode.call("matches", "r", 3, tolerance=6.0 / 127)
    assert not pair.decode.call("matches", "r", 3)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_flipped_bit_loses_the_handoff_before_anything_is_written(pair, codec):
    pair.prefill.call("corrupt", 0)
    ticket = pair.decode.call("reserve", "r", tokens=50, codec=codec)
    pair.prefill.call("send", ticket, 3, tokens=50)
    assert pair.decode.call("received", "r") == Lost("parcel 0: digest mismatch")
    assert pair.prefill.call("sent", "r") == Lost("decode worker: parcel 0: digest mismatch")
    pair.decode.call("release", "r")
    assert pair.decode.call("writes_of", "r") == 0
    pair.prefill.call("corrupt", -1)
    assert isinstance(pair.hand_over("again", codec=codec), Landed)


def test_who_does_not_fit_is_refused(pair):
    ticket = pair.decode.call("reserve", "r", epoch=2, tokens=50)
    for change, reason in (
        ({"epoch": 1}, "no lease for epoch 1"),
        ({"epoch": 3}, "no lease for epoch 3"),
        ({"request_id": "other"}, "no lease"),
        ({"generation": "an older process"}, "generation an older process is gone"),
        ({"layout": "0" * 16}, "KV layout"),
        ({"transport": "pigeon"}, "transport pigeon"),
        ({"codec": "zip"}, "codec 'zip'"),
    ):
        wrong = ticket | change
        pair.prefill.call("send", wrong, 5, tokens=50)
        lost = pair.prefill.call("sent", wrong["request_id"])
        assert isinstance(lost, Lost), change
        assert reason in lost.reason
    assert pair.decode.call("writes_of", "r") == 0
    pair.prefill.call("send", ticket, 5, tokens=50)
    assert isinstance(pair.decode.call("received", "r"), Landed)
    pair.decode.call("release", "r")


def test_a_hundred_handoffs_at_once(pair):
    tickets = [
        pair.decode.call("reserve", f"r{i}", tokens=20 + i, codec=["raw", "lossless"][i % 2]) for i in range(100)
    ]
    sends = [pair.prefill.start("send", ticket, i, tokens=20 + i) for i, ticket in enumerate(tickets)]
    for send in sends:
        pair.prefill.answer(send)
    for i in range(100):
        assert isinstance(pair.decode.call("received", f"r{i}"), Landed)
        assert pair.decode.call("matches", f"r{i}", i)
        pair.decode.call("release", f"r{i}")


def test_a_slow_receiver_is_waited_for_although_the_sender_is_done(pair):
    ticket = pair.decode.call("reserve", "r", tokens=640, slow_s=0.03)
    pair.prefill.call("send", ticket, 4, tokens=640)  # 40 blocks: 1.2 s, more than the stall limit
    pair.prefill.call("encoded", "r")
    landed = pair.decode.call("received", "r")
    assert isinstance(landed, Landed)
    assert landed.land_s > 0.5
    assert pair.decode.call("matches", "r", 4)
    pair.decode.call("release", "r")


def test_the_sender_may_give_up_midway(pair):
    ticket = pair.decode.call("reserve", "r", tokens=640)
    pair.prefill.call("send", ticket, 5, tokens=640, slow_s=0.02)
    pair.until(lambda: pair.decode.call("writes_of", "r") > 2, 5)
    pair.prefill.call("abort", "r")
    pair.prefill.call("encoded", "r")
    assert pair.prefill.call("sent", "r") == Lost("changed its mind")
    assert pair.decode.call("received", "r") == Lost("prefill worker: changed its mind")
    pair.decode.call("release", "r")


def test_the_receiver_may_give_up_midway(pair):
    ticket = pair.decode.call("reserve", "r", tokens=640)
    pair.prefill.call("send", ticket, 5, tokens=640, slow_s=0.02)
    pair.until(lambda: pair.decode.call("writes_of", "r") > 2, 5)
    pair.decode.call("release", "r")
    writes = pair.decode.call("writes_of", "r")
    assert pair.prefill.call("sent", "r") == Lost("decode worker: released by the decode worker")
    pair.prefill.call("encoded", "r")
    pair.idle()
    assert pair.decode.call("writes_of", "r") == writes
    pair.decode.call("release", "r")  # as often as one likes


def test_release_waits_for_the_write_under_way(pair):
    pair.decode.call("hold")
    ticket = pair.decode.call("reserve", "r", tokens=50)
    pair.prefill.call("send", ticket, 5, tokens=50)
    pair.until(lambda: pair.decode.call("writes_of", "r") == 1, 5)
    release = pair.decode.start("release", "r")
    time.sleep(0.2)
    assert not pair.decode.has_answered(release)
    pair.decode.call("resume")
    pair.decode.answer(release)
    assert pair.decode.call("writes_of", "r") == 1


@pytest.mark.parametrize("extra", [None, (0, 10, 20), (0, 40, 20), (4, 0, 1), (0, 0, 0)])
def test_what_is_left_out_or_pushed_twice_never_lands(pair, extra):
    tokens = 51 if extra is None else 50
    ticket = pair.decode.call("reserve", "r", tokens=tokens)
    pair.prefill.call("send", ticket, 5, tokens=tokens, finish=False, chunk=50 if extra is None else 64, last=50)
    if extra is not None:
        pair.prefill.call("push", "r", *extra)
    pair.prefill.call("finish", "r")
    reason = "4 (layer, token) pairs never pushed" if extra is None else "push refused"
    assert reason in pair.prefill.call("sent", "r").reason
    assert reason in pair.decode.call("received", "r").reason
    pair.decode.call("release", "r")


def test_leases_outlive_a_long_prefill_but_not_its_budget(pair):
    pair.decode.call("reserve", "nobody", tokens=50)
    ticket = pair.decode.call("reserve", "endless", tokens=50)
    pair.prefill.call("send", ticket, 5, tokens=50, finish=False, budget_s=1.5)
    # Heartbeats keep the lease although nothing comes for longer than the stall limit.
    assert pair.prefill.call("sent", "endless") == Expired("the request's budget is used up")
    assert pair.decode.call("received", "endless") == Lost("prefill worker: the request's budget is used up")
    assert pair.decode.call("received", "nobody") == Expired("nobody began within 2 s")
    for name in ("nobody", "endless"):
        pair.decode.call("release", name)


def test_a_gather_that_fails_loses_its_handoff_only(pair):
    ticket = pair.decode.call("reserve", "r", tokens=50)
    pair.prefill.call("send", ticket, 5, tokens=50, break_layer=2)
    assert pair.prefill.call("sent", "r") == Lost("cannot encode: a broken cache")
    assert pair.decode.call("received", "r") == Lost("prefill worker: cannot encode: a broken cache")
    pair.decode.call("release", "r")
    assert isinstance(pair.hand_over("next"), Landed)


def test_buffers_smaller_than_the_kv_only_slow_the_handoff(small_pair):
    assert isinstance(small_pair.hand_over("r", tokens=8000), Landed)  # 16 MB of KV
    assert small_pair.decode.call("matches", "r", 3)
    small_pair.idle()


def test_the_landing_side_says_when_it_is_full(small_pair):
    for name in ("a", "b"):
        small_pair.decode.call("reserve", name, tokens=10)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        small_pair.decode.call("reserve", "c", tokens=10)
    small_pair.decode.call("release", "a")
    small_pair.decode.call("reserve", "c", tokens=10)
    with pytest.raises(RuntimeError, match="not released"):
        small_pair.decode.call("reserve", "c", epoch=2, tokens=10)


def test_another_layout_is_refused_by_the_receiver(small_pair):
    other = small_pair.layout | {"model": "other weights"}
    ticket = small_pair.decode.call("reserve", "r", tokens=50)
    small_pair.prefill.call("stop_sender")
    small_pair.prefill.call("start_sender", other, small_pair.config(), worker_id="stranger")
    ours = small_pair.prefill.call("family")
    assert ours != ticket["layout"]
    small_pair.prefill.call("send", ticket | {"layout": ours}, 5, tokens=50)
    assert "decode worker refused: KV layout" in small_pair.prefill.call("sent", "r").reason


@pytest.mark.parametrize("closing", ["sender", "receiver"])
def test_closing_loses_what_is_under_way_and_leaves_no_thread(mortal_pair, closing):
    pair = mortal_pair
    ticket = pair.decode.call("reserve", "r", tokens=50)
    pair.prefill.call("send", ticket, 5, tokens=50, finish=False)
    pair.until(lambda: pair.decode.call("writes_of", "r") == 4, 5)
    closer, other = (pair.prefill, pair.decode) if closing == "sender" else (pair.decode, pair.prefill)
    closer.call(f"stop_{closing}")
    assert isinstance(pair.decode.call("received", "r"), Lost)
    assert isinstance(pair.prefill.call("sent", "r"), Lost)
    other.call("stop_receiver" if closing == "sender" else "stop_sender")
    for worker in (pair.prefill, pair.decode):
        pair.until(lambda worker=worker: not [name for name in worker.call("threads") if name.startswith("kv-")], 3)


def test_a_sender_that_is_stopped_resumed_and_killed(mortal_pair):
    pair = mortal_pair
    _stop_sender_under_a_fetch(pair, "stopped")
    stopped = time.monotonic()
    assert isinstance(pair.decode.call("received", "stopped"), Lost)
    assert time.monotonic() - stopped < 1.0 + 0.6  # the stall limit and one tick, with room for a busy machine
    pair.decode.call("release", "stopped")
    if pair.transport == "nixl-over-tcp":  # only there may the abandoned transfer still write
        pair.until(lambda: pair.decode_held()[2] > 0, 2)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            pair.decode.call("reserve", "next", tokens=10)
    pair.prefill.signal(signal.SIGCONT)
    assert isinstance(pair.prefill.call("sent", "stopped"), Lost)
    pair.idle()
    assert isinstance(pair.hand_over("after"), Landed)
    assert pair.decode.call("matches", "after", 3)

    _stop_sender_under_a_fetch(pair, "killed")
    pair.prefill.signal(signal.SIGKILL)
    killed = time.monotonic()
    assert isinstance(pair.decode.call("received", "killed"), Lost)
    assert time.monotonic() - killed < 2.0
    pair.decode.call("release", "killed")
    pair.until(lambda: pair.decode_held() == (0, 0, 0), 3)
    pair.decode.call("reserve", "next", tokens=10)


def test_a_receiver_that_is_stopped_resumed_and_killed(mortal_pair):
    pair = mortal_pair
    used = [worker.call("busy_s") for worker in (pair.prefill, pair.decode)]
    time.sleep(1.0)
    used = [worker.call("busy_s") - was for worker, was in zip((pair.prefill, pair.decode), used, strict=True)]
    assert max(used) < 0.15, used  # idle; NIXL's progress thread takes 4 % of a core

    for number, reason in ((signal.SIGSTOP, "decode worker silent"), (signal.SIGKILL, "decode worker closed")):
        name = number.name
        pair.decode.call("hold")
        ticket = pair.decode.call("reserve", name, tokens=640)
        pair.prefill.call("send", ticket, 5, tokens=640)
        pair.until(lambda name=name: pair.decode.call("writes_of", name) == 1, 5)
        assert pair.prefill_held()[1] > 0
        pair.decode.signal(number)
        sent = time.monotonic()
        lost = pair.prefill.call("sent", name)
        assert time.monotonic() - sent < 1.0 + 0.6
        assert reason in lost.reason
        pair.until(lambda: pair.prefill_held() == (0, 0), 1)
        if number == signal.SIGSTOP:
            pair.decode.signal(signal.SIGCONT)
            pair.decode.call("resume")
            assert isinstance(pair.decode.call("received", name), Lost)
            pair.decode.call("release", name)
            pair.idle()
            assert isinstance(pair.hand_over("after"), Landed)


def _stop_sender_under_a_fetch(pair, name):
    """Stops the sender while blocks are announced that the receiver, which has room for one, has yet to fetch."""
    pair.decode.call("hold")
    ticket = pair.decode.call("reserve", name, tokens=2000)
    pair.prefill.call("send", ticket, 5, tokens=2000, chunk=2000, finish=False)
    pair.until(lambda: pair.decode.call("writes_of", name) == 1, 5)
    pair.until(lambda: pair.prefill_held()[1] > 3 << 20, 5)
    time.sleep(0.1)
    pair.prefill.signal(signal.SIGSTOP)
    pair.decode.call("resume")
