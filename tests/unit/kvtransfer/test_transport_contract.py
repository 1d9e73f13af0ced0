"""What every transport promises of one fetch, between two real processes; where promises differ, which one is tested.

Loopback has one process only, so nobody in it can be stopped or killed alone: its part is in ``test_transports.py``.
"""

from __future__ import annotations

import signal
import time

MIB = 1 << 20
BIG = 48 * MIB  # some tens of milliseconds on any of the transports, so that signals meet it under way
CARRIERS = {
    "tcp": "tcp",
    "tcp-tls": "tcp, TLSv1.3",
    "nixl": "cma/memory (intra-node",
    "nixl-over-tcp": "tcp/lo (intra-node",
    "gloo": "gloo over tcp",
    "nccl": "nccl between GPUs",
}


def test_fetches_happen_in_the_order_they_are_made_and_touch_nothing_else(ends):
    source = ends.connect(8 * MIB)
    for offset, nbytes, at in ((5, 1, 100), (MIB - 3, 2 * MIB + 7, 3 * MIB + 1), (0, 4096, MIB), (8 * MIB - 1, 1, 0)):
        assert ends.fetch(source, offset, nbytes, at)[0] == ""
        assert ends.holds(1, offset, nbytes, at)
    assert ends.holds(0, 0, MIB - 101, 101)  # between what was fetched, nothing was written
    assert ends.holds(0, 0, 2 * MIB - 4095, MIB + 4096)
    assert ends.holds(0, 0, 2 * MIB - 8, 5 * MIB + 8)
    for seed in (2, 3):  # what a later fetch brings was there when it was asked for
        ends.exporter.call("rewrite", seed)
        assert ends.fetch(source, MIB, 2 * MIB, 0)[0] == ""
        assert ends.holds(seed, MIB, 2 * MIB, 0)
    reason, fenced, _ = ends.fetch(source, 8 * MIB - 1, 2, 0)
    assert "outside" in reason
    assert fenced
    assert ends.fetch(source, 0, 8 * MIB, 0)[0] == ""
    assert ends.fetcher.call("carrier", source).startswith(CARRIERS[ends.transport])


def test_a_slow_peer_is_waited_for(ends):
    source = ends.connect(BIG)
    fetch = ends.fetcher.start("fetch", source, 0, BIG, 0, 20.0)
    for _ in range(5):
        ends.exporter.signal(signal.SIGSTOP)
        time.sleep(0.05)
        ends.exporter.signal(signal.SIGCONT)
        time.sleep(0.01)
    assert ends.fetcher.answer(fetch)[0] == ""
    assert ends.holds(1, 0, BIG, 0)


def test_a_stopped_peer_costs_no_more_than_the_deadline_and_writes_nothing_late(ends):
    source = ends.connect(BIG)
    assert ends.fetch(source, 0, 4096, 0)[0] == ""
    ends.exporter.signal(signal.SIGSTOP)
    reason, fenced, seconds = ends.fetch(source, MIB, BIG - MIB, MIB, 0.4)
    if ends.promises.reads_the_stopped:
        assert reason == ""
        assert ends.holds(1, MIB, BIG - MIB, MIB)
        return
    assert reason
    assert seconds < 0.4 + 0.3
    assert fenced == ends.promises.fenced
    if not fenced:
        assert not ends.fetcher.call("transfer_ended")
    before = ends.fetcher.call("digest")
    ends.exporter.signal(signal.SIGCONT)
    if not fenced:  # it may write until it says that it has ended, and not after
        ends.wait_for_the_end()
        before = ends.fetcher.call("digest")
    time.sleep(0.3)
    assert ends.fetcher.call("digest") == before


def test_a_killed_peer_is_noticed_at_once_and_writes_nothing_late(ends):
    source = ends.connect(BIG)
    ends.exporter.signal(signal.SIGSTOP)
    fetch = ends.fetcher.start("fetch", source, 0, BIG, 0, 10.0)
    time.sleep(0.1)
    killed = time.monotonic()
    ends.exporter.signal(signal.SIGKILL)
    reason, _, _ = ends.fetcher.answer(fetch)
    if ends.promises.reads_the_stopped and not reason:
        assert ends.holds(1, 0, BIG, 0)  # it was over before the kill
    else:
        assert reason
        assert time.monotonic() - killed < 2.0
        ends.wait_for_the_end()
    before = ends.fetcher.call("digest")
    assert ends.fetch(source, 0, MIB, 0, 2.0)[0]  # and from now on there is nothing to fetch
    time.sleep(0.2)
    assert ends.fetcher.call("digest") == before


def test_a_peer_that_comes_back_is_another_one(ends):
    old = ends.exporter.call("export", ends.config, MIB, 1)
    source = ends.fetcher.call("connect", ends.config, old)
    assert ends.fetch(source, 0, MIB, 0)[0] == ""
    ends.replace_exporter()
    again = ends.connect(MIB, seed=2)
    assert ends.fetch(again, 0, MIB, 0)[0] == ""
    assert ends.holds(2, 0, MIB, 0)
    assert ends.fetch(source, 0, MIB, 0, 2.0)[0]
    assert ends.fetcher.call("connect_and_fetch", old, MIB)  # refused at the one or at the other
    assert ends.holds(2, 0, MIB, 0)
    assert ends.fetch(again, 0, MIB, 0)[0] == ""


def test_an_interrupted_fetch_ends_soon(ends):
    source = ends.connect(BIG)
    assert ends.fetch(source, 0, 4096, 0)[0] == ""
    # Stopped in the middle of an answer, where a library may be what waits.
    fetch = ends.fetcher.start("fetch", source, 0, BIG, 0, 1.5)
    time.sleep(0.005)
    ends.exporter.signal(signal.SIGSTOP)
    time.sleep(0.1)
    interrupted = time.monotonic()
    ends.fetcher.call("interrupt", source)
    reason, fenced, _ = ends.fetcher.answer(fetch)
    if not reason:  # it was faster than the signal, or reads the stopped
        assert ends.holds(1, 0, BIG, 0)
    else:
        assert time.monotonic() - interrupted < (0.3 if ends.promises.interruptible else 1.5 + 0.3)
        assert fenced == ends.promises.fenced
    assert ends.fetch(source, 0, 1, 0, 0.5)[0]


def test_many_sources_of_one_exporter_fetch_at_once(ends):
    address = ends.exporter.call("export", ends.config, 16 * MIB, 1)
    sources = [ends.fetcher.call("connect", ends.config, address) for _ in range(16)]
    fetches = [ends.fetcher.start("fetch", source, at * MIB, MIB, at * MIB, 10.0) for at, source in enumerate(sources)]
    assert [ends.fetcher.answer(fetch)[0] for fetch in fetches] == [""] * 16
    assert ends.holds(1, 0, 16 * MIB, 0)
