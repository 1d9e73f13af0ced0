"""A receiver against senders, and a sender against receivers, that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from contextlib import asynccontextmanager

import pytest
import torch

from baton.config_handoff import HandoffConfig
from baton.errors import ConfigError
from baton.frames import FrameStream
from baton.layout import KVLayout
from baton.messages import Ticket
from baton.request import TokenEvent
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import make_codec
from kvtransfer.handoff import Landed, Lost
from kvtransfer.protocol import (
    CONTROL,
    PROTOCOL,
    Ack,
    Alive,
    Attach,
    Begin,
    Block,
    Commit,
    Complete,
    Drop,
    Parcel,
    Refused,
    Welcome,
    block_digest,
)
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports import make_exporter

LAYOUT = KVLayout("m", 2, 1, 8, "float32")
CONFIG = HandoffConfig(transport="loopback", stall_s=0.5, landing_bytes=4 << 20, staging_bytes=4 << 20)
TOKENS = 4
FIRST = TokenEvent("r", 0, 1)


class Hostile:
    """Says what it likes to a receiver, with one staged block that is right."""

    def __init__(self, receiver):
        self.receiver = receiver
        self.memory = HostMemory(4096)
        self.exporter = make_exporter("loopback", self.memory, name="x", host="", ucx_tls="")
        kv = torch.ones(TOKENS, 1, 8)
        self.nbytes = make_codec("raw", LAYOUT).encode(kv, kv, self.memory.view(0, 4096))

    def attach(self, **changes):
        base = Attach(PROTOCOL, "x", "gx", "gd", LAYOUT.family, LAYOUT.dtype, "loopback", self.exporter.address())
        return dataclasses.replace(base, **changes)

    def parcel(self, seq, signed_layer):
        digest = block_digest(
            self.memory.view(0, self.nbytes), request_id="r", epoch=1, layout=LAYOUT.fingerprint,
            layer=signed_layer, start=0, count=TOKENS, codec="raw",
        )  # fmt: skip
        block = Block(signed_layer, 0, TOKENS, self.nbytes, digest)
        return Parcel("r", 1, seq, "raw", 0, (block,))

    async def connect(self):
        return await FrameStream.connect("127.0.0.1", self.receiver.port, CONTROL, timeout_s=1.0)

    async def welcome(self):
        stream = await self.connect()
        stream.send(self.attach())
        assert isinstance(await stream.receive(), Welcome)
        return stream


@asynccontextmanager
async def receiving():
    receiver = Receiver(LAYOUT, CONFIG, worker_id="d", generation="gd")
    await receiver.start()
    written = []
    receiver.reserve(
        "r", 1, tokens=TOKENS, codec="raw", budget_s=5.0, write=lambda layer, start, k, v: written.append(layer)
    )
    try:
        async with asyncio.timeout(10):
            yield receiver, Hostile(receiver), written
    finally:
        await receiver.release("r")
        stats = receiver.stats()
        await receiver.close()
        assert (stats.leases, stats.landing_bytes_used, stats.quarantined_bytes) == (0, 0, 0)


def test_who_speaks_by_the_book_is_served():
    async def run():
        async with receiving() as (receiver, hostile, written):
            stream = await hostile.welcome()
            for record in (Begin("r", 1, TOKENS, "raw"), hostile.parcel(0, 0), hostile.parcel(1, 1)):
                stream.send(record)
            stream.send(Commit("r", 1, 2, FIRST, 0.0, 0.0))
            assert isinstance(await receiver.outcome("r"), Landed)
            assert written == [0, 1]
            answers = [await stream.receive() for _ in range(3)]
            assert [type(answer) for answer in answers] == [Ack, Ack, Complete]
            await stream.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "opening",
    [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 1 << 31), struct.pack("<I", 2) + b"\xc1\xc1", struct.pack("<I", 99)],
)
def test_bytes_that_are_no_frame_end_the_connection_only(opening):
    async def run():
        async with receiving() as (receiver, hostile, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
            writer.write(opening)
            assert await reader.read() == b""  # at once, or when nobody introduced itself for stall_s
            writer.close()
            assert receiver.stats().leases == 1
            await (await hostile.welcome()).close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": 99}, "protocol 99"),
        ({"receiver_generation": "old"}, "generation old is gone"),
        ({"layout": "x"}, "KV layout x"),
        ({"transport": "tcp"}, "transport tcp"),
        ({"address": b"nowhere"}, "closed"),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(change, reason):
    async def run():
        async with receiving() as (_, hostile, _):
            stream = await hostile.connect()
            stream.send(hostile.attach(**change))
            answer = await stream.receive()
            assert isinstance(answer, Refused)
            assert reason in answer.reason
            assert await stream.receive() is None
            await stream.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("seq", "layer", "change", "reason"),
    [
        (0, 0, {"offset": 4090}, "outside the peer's 4096 bytes"),
        (0, 0, {"offset": -64}, "outside the peer's 4096 bytes"),
        (0, 0, {"nbytes": 1 << 40}, "bytes, at most 256"),
        (0, 0, {"count": 1 << 40}, "at most 0"),
        (0, 0, {"codec": "zip"}, "codec zip"),
        (0, 0, {"digest": b"x" * 16}, "digest mismatch"),
        (0, 1, {"layer": 0}, "digest mismatch"),  # right bytes, wrong place
        (3, 0, {}, "expected 0"),
    ],
)
def test_a_parcel_that_lies_is_lost_and_never_written(alter, seq, layer, change, reason):
    async def run():
        async with receiving() as (receiver, hostile, written):
            stream = await hostile.welcome()
            stream.send(Begin("r", 1, TOKENS, "raw"))
            stream.send(alter(hostile.parcel(seq, layer), change))
            lost = await receiver.outcome("r")
            assert isinstance(lost, Lost)
            assert reason in lost.reason
            assert written == []
            await stream.close()

    asyncio.run(run())


def test_one_sender_cannot_touch_the_lease_of_another():
    async def run():
        async with receiving() as (receiver, hostile, written):
            mine, other = await hostile.welcome(), await hostile.welcome()
            mine.send(Begin("r", 1, TOKENS, "raw"))
            mine.send(hostile.parcel(0, 0))
            assert isinstance(await mine.receive(), Ack)
            for record in (hostile.parcel(1, 1), Commit("r", 1, 2, FIRST, 0, 0), Drop("r", 1, "mine now")):
                other.send(record)
            other.send(Begin("r", 1, TOKENS, "raw"))
            assert isinstance(await other.receive(), Drop)
            mine.send(hostile.parcel(1, 1))
            mine.send(Commit("r", 1, 2, FIRST, 0.0, 0.0))
            assert isinstance(await receiver.outcome("r"), Landed)
            assert written == [0, 1]
            other.send(Ack("r", 1, 0))  # not a sender's record
            assert await other.receive() is None
            await asyncio.gather(mine.close(), other.close())

    asyncio.run(run())


async def _sent_to(answers):
    """How a sender's handoff ends when the receiver answers Attach with ``answers`` and then keeps quiet."""
    done = asyncio.Event()

    async def serve(reader, writer):
        stream = FrameStream(reader, writer, CONTROL)
        await stream.receive()
        for answer in answers:
            stream.send(answer)
        await done.wait()
        await stream.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sender = Sender(LAYOUT, CONFIG, worker_id="p", generation="gp")
    await sender.start()
    ticket = Ticket("r", 1, "127.0.0.1", port, "gd", LAYOUT.family, "raw", "loopback")
    kv = torch.ones(TOKENS, 1, 8)
    outgoing = sender.open(ticket, tokens=TOKENS, budget_s=5.0, gather=lambda *_: (kv, kv))
    for layer in range(2):
        outgoing.push(layer, 0, TOKENS)
    outgoing.finish(FIRST)
    async with asyncio.timeout(3):
        outcome = await outgoing.outcome()
        await outgoing.encoded()
    stats = sender.stats()
    done.set()
    await sender.close()
    server.close()
    assert (stats.handoffs, stats.staging_bytes_used) == (0, 0)
    assert isinstance(outcome, Lost)
    return outcome.reason


WELCOME = Welcome("d", "gd")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([], "did not answer"),
        ([Welcome("d", "another process")], "instead of Welcome"),
        ([Refused("no")], "refused: no"),
        ([Alive()], "Alive instead of Welcome"),
        ([WELCOME], "decode worker"),  # and then silence
        ([WELCOME, Begin("r", 1, 4, "raw")], "Begin on the sender's side"),
        ([WELCOME, Ack("r", 1, 7)], "not outstanding"),
        ([WELCOME, Complete("r", 1, 0.0, 0.0, 0.0, 1)], "completed a handoff that is not"),
        ([WELCOME, Drop("r", 1, "full")], "decode worker: full"),
        ([WELCOME, Drop("r", 2, "other epoch"), Drop("q", 1, "other request")], "decode worker"),
    ],
)
def test_a_receiver_that_misbehaves_costs_its_handoff_and_nothing_else(answers, reason):
    assert reason in asyncio.run(_sent_to(answers))


def test_nobody_listens():
    async def run():
        sender = Sender(LAYOUT, CONFIG, worker_id="p", generation="gp")
        await sender.start()
        ticket = Ticket("r", 1, "127.0.0.1", 1, "gd", LAYOUT.family, "raw", "loopback")
        outcome = await sender.open(ticket, tokens=4, budget_s=5.0, gather=lambda *_: None).outcome()
        await sender.close()
        assert isinstance(outcome, Lost)
        assert "cannot connect to 127.0.0.1:1" in outcome.reason

    asyncio.run(run())


@pytest.mark.parametrize(("end", "field"), [(Sender, "staging_bytes"), (Receiver, "landing_bytes")])
def test_buffers_must_hold_a_block(end, field):
    tiny = HandoffConfig(transport="loopback", **{field: 4096})
    with pytest.raises(ConfigError, match=f"handoff.{field}: must hold one block"):
        asyncio.run(end(LAYOUT, tiny, worker_id="w", generation="g").start())
