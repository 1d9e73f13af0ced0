"""Probes between real workers without a model: they land bit by bit, both ways, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton import host
from baton.config_handoff import HandoffConfig
from baton.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from baton.layout import KVLayout
from baton.messages import Granted, Hello, Load, Probe, ProbeLanded, ProbeSent
from baton.secure import ClusterKey
from deploy.doctor.ask import Line, Place, pair, workers
from deploy.doctor.facts import Pair
from kvtransfer.bare_worker import HOST, BareWorker, Order
from kvtransfer.probe import MAX_BUDGET_S, MAX_PROBE_BYTES, MIN_TOKENS, Pattern, refusal, tcp_received

KEY = "k" * 40
LAYOUT = KVLayout("m", 4, 2, 32, "float32")
SMALL = HandoffConfig(transport="tcp", landing_bytes=8 << 20, staging_bytes=8 << 20, stall_s=2.0)
IDLE = Load(0, 0, 0, 0, 0, 0, 0, 100, 0)


@contextlib.asynccontextmanager
async def running(role: str, layout: KVLayout = LAYOUT, **changed: Any) -> AsyncIterator[tuple[BareWorker, Place]]:
    worker = BareWorker(Order(role, layout, SMALL.model_copy(update=changed), KEY))
    place = Place(role, role, HOST, await worker.start())
    try:
        yield worker, place
    finally:
        await worker.close()


@contextlib.asynccontextmanager
async def lines(**changed: Any) -> AsyncIterator[tuple[Line, Line, BareWorker, BareWorker]]:
    async with running("prefill", **changed) as (sender, one), running("decode", **changed) as (lander, other):
        ends = [await Line.open(place, ClusterKey(KEY)) for place in (one, other)]
        try:
            yield ends[0], ends[1], sender, lander
        finally:
            for end in ends:
                end.close()


async def idle(*ends: BareWorker) -> None:
    async with asyncio.timeout(5):
        while any(end.load() != replace(end.load(), handoffs=0, buffer_bytes_used=0) for end in ends):
            await asyncio.sleep(0.01)
    assert all(end.load().buffer_bytes_quarantined == 0 for end in ends)


def probe(name: str, **changed: Any) -> Probe:
    return replace(Probe(name, 1 << 20, "raw", 10.0, None), **changed)


async def hand_over(sender: Line, lander: Line, asked: Probe) -> tuple[ProbeSent, ProbeLanded]:
    granted = await lander.ask(asked, timeout_s=10)
    assert isinstance(granted, Granted)
    sent = await sender.ask(replace(asked, ticket=granted.ticket), timeout_s=10)
    return sent, await lander.answer(asked.request_id, timeout_s=10)


@pytest.mark.parametrize("codec", ["raw", "lossless", "int8-zstd", "auto"])
async def test_a_probe_lands_both_ways(codec: str) -> None:
    async with lines() as (prefill, decode, one, other):
        for sender, lander in ((prefill, decode), (decode, prefill)):
            sent, landed = await hand_over(sender, lander, probe("p", codec=codec))
            assert landed.exact or codec == "int8-zstd"
            tokens = (1 << 20) // LAYOUT.token_bytes
            assert 0 < sent.kv_bytes < tokens * LAYOUT.token_bytes
            assert 0 < sent.latency_s <= sent.setup_s + sent.seconds
            assert sent.link_bytes_per_s > 0
            assert landed.tcp_bytes >= landed.wire_bytes > 0, "the kernel saw every byte"
            assert (landed.transport, landed.carrier) == ("tcp", "tcp")
            await idle(one, other)


async def test_a_layout_with_huge_tokens_still_sends_a_few() -> None:
    wide = KVLayout("wide", 16, 8, 256, "bfloat16")
    async with lines(layout=wide) as (prefill, decode, one, other):
        sent, landed = await hand_over(prefill, decode, probe("p", kv_bytes=1))
        assert landed.exact
        assert sent.kv_bytes == wide.token_bytes * (MIN_TOKENS - 5)
        await idle(one, other)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kv_bytes": 0}, "kv_bytes"), ({"kv_bytes": MAX_PROBE_BYTES + 1}, "kv_bytes"), ({"codec": "zip"}, "codec"),
        ({"budget_s": 0.0}, "budget_s"), ({"budget_s": MAX_BUDGET_S + 1}, "budget_s"),
        ({"budget_s": float("nan")}, "budget_s"),
    ],
)  # fmt: skip
async def test_bad_probes_are_refused_by_field(wrong: dict[str, Any], field: str) -> None:
    async with running("decode") as (worker, place):
        line = await Line.open(place, ClusterKey(KEY))
        with pytest.raises(InvalidRequest) as refused:
            await line.ask(probe("p", **wrong), timeout_s=5)
        assert refused.value.field == field
        assert worker.load() == replace(worker.load(), handoffs=0)
        line.close()


async def test_one_probe_at_a_time_and_given_up_ones_leave_nothing() -> None:
    async with running("decode") as (worker, place):
        line = await Line.open(place, ClusterKey(KEY))
        assert isinstance(await line.ask(probe("first"), timeout_s=5), Granted)
        assert worker.load().handoffs == 1
        with pytest.raises(Overloaded, match="another probe"):
            await line.ask(probe("second"), timeout_s=5)
        line.cancel("first")
        await idle(worker)
        assert isinstance(await line.ask(probe("third"), timeout_s=5), Granted)
        line.close()  # the doctor is gone
        await idle(worker)


async def test_a_probe_that_nobody_answers_ends_with_its_budget() -> None:
    async with running("decode") as (worker, place):
        line = await Line.open(place, ClusterKey(KEY))
        await line.ask(probe("p", budget_s=0.2), timeout_s=5)
        with pytest.raises(BatonError) as ended:
            await line.answer("p", timeout_s=5)
        assert ended.value.code == "DEADLINE_EXCEEDED"
        await idle(worker)
        line.close()


async def test_a_ticket_to_nowhere_is_reported(free_port: int) -> None:
    async with lines() as (prefill, decode, one, _):
        granted = await decode.ask(probe("p"), timeout_s=5)
        with pytest.raises(Unavailable, match="cannot connect"):
            await prefill.ask(probe("p", ticket=replace(granted.ticket, port=free_port)), timeout_s=5)
        with pytest.raises(Unavailable, match="layout"):
            await prefill.ask(probe("q", ticket=replace(granted.ticket, layout="other")), timeout_s=5)
        await idle(one)


async def test_a_stranger_without_the_key_is_told_nothing() -> None:
    async with running("decode") as (_, place):
        (found,) = await workers([place], None)
        assert found.error
        assert found.hello is None
        (wrong,) = await workers([place], ClusterKey("x" * 40))
        assert wrong.error


async def test_workers_answer_with_their_machine_and_clock() -> None:
    async with running("decode") as (_, place):
        (found,) = await workers([place], ClusterKey(KEY))
    assert found.error == ""
    assert found.host is not None
    assert found.host.python == host.gather().python
    assert abs(found.ahead_s) < max(0.05, found.rtt_s)
    assert isinstance(found.hello, Hello)


async def test_another_process_at_the_port_is_noticed() -> None:
    async with running("decode") as (_, place):
        (found,) = await workers([replace(place, generation="dead")], ClusterKey(KEY))
    assert "not dead" in found.error


async def test_a_closed_port_is_named(free_port: int) -> None:
    (found,) = await workers([Place("w", "decode", HOST, free_port)], None)
    assert f"{HOST}:{free_port}" in found.error


async def examined(prefill: KVLayout, decode: KVLayout) -> tuple[Pair, int]:
    """What the doctor finds of two workers, and the leases that the landing one holds afterwards."""
    async with running("prefill", prefill) as (sender, one), running("decode", decode) as (lander, other):
        found = await workers([one, other], ClusterKey(KEY))
        result = await pair((one, found[0]), (other, found[1]), codec="auto", key=ClusterKey(KEY))
        await idle(sender, lander)
        return result, lander.load().handoffs


async def test_pairs_of_different_models_are_not_probed() -> None:
    result, held = await examined(LAYOUT, replace(LAYOUT, model="other"))
    assert (result.forward, result.back, held) == ((), None, 0)


async def test_pairs_of_different_dtypes_hand_over_exactly() -> None:
    result, held = await examined(LAYOUT, replace(LAYOUT, dtype="bfloat16"))
    assert result.back is not None
    for direction in (*result.forward, result.back):
        assert direction.error == ""
        assert direction.landed is not None
        assert direction.landed.exact, "small integers are the same number in both"
        assert direction.bytes_per_s > 0
    assert held == 0


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def test_refusal_depends_on_what_waits_and_what_is_held() -> None:
    assert refusal(IDLE) == ""
    assert refusal(replace(IDLE, running=64, handoffs=3, buffer_bytes_used=50)) == ""
    assert "wait" in refusal(replace(IDLE, waiting=1))
    assert "buffer" in refusal(replace(IDLE, buffer_bytes_used=51))
    assert "buffer" in refusal(replace(IDLE, buffer_bytes_used=30, buffer_bytes_quarantined=30))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pattern_tells_neighbours_apart(dtype: Any) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    mine, theirs = Pattern(layout, 64), Pattern(layout, 64)
    theirs.compare(2, 5, *mine.gather(2, 5, 9))
    assert theirs.exact
    for layer, start in ((1, 5), (3, 5), (2, 4), (2, 6)):
        other = Pattern(layout, 64)
        other.compare(layer, start, *mine.gather(2, 5, 9))
        assert not other.exact
    swapped, bent = Pattern(layout, 64), Pattern(layout, 64)
    keys, values = mine.gather(0, 0, 8)
    swapped.compare(0, 0, values, keys)
    assert not swapped.exact
    keys = torch.clone(keys)
    keys[3, 1, 7] += 1
    bent.compare(0, 0, keys, values)
    assert not bent.exact


def test_the_kernels_count_of_bytes_over_tcp() -> None:
    before = tcp_received()
    with socket.create_server((HOST, 0)) as server, socket.create_connection(server.getsockname()) as sending:
        receiving, _ = server.accept()
        with receiving:
            sending.sendall(b"x" * 5000)
            received = 0
            while received < 5000:
                received += len(receiving.recv(5000))
            assert tcp_received() - before >= 5000
    left, right = socket.socketpair()
    with left, right:
        before = tcp_received()
        left.sendall(b"x" * 5000)
        right.recv(5000)
        assert tcp_received() - before < 5000
