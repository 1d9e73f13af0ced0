"""Handoffs between members of a cluster: who lacks the key reads nothing, and what anybody changed is not decoded."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import asynccontextmanager

import pytest
import torch
import xxhash

from baton.config_handoff import HandoffConfig
from baton.frames import FrameStream
from baton.guard import Guard
from baton.layout import KVLayout
from baton.request import TokenEvent
from baton.secure import ClusterKey
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import make_codec
from kvtransfer.handoff import Landed, Lost
from kvtransfer.protocol import (
    CONTROL,
    DIGEST_BYTES,
    PROTOCOL,
    Ack,
    Alive,
    Attach,
    Begin,
    Block,
    Commit,
    Parcel,
    Welcome,
    aligned,
    block_digest,
)
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.signing import BlockKey
from kvtransfer.transports import make_exporter

LAYOUT = KVLayout("m", 2, 1, 8, "float32")
KEY, OTHER = ClusterKey("k" * 40), ClusterKey("o" * 40)
TOKENS = 4
FIRST = TokenEvent("r", 0, 1)
PLACE = {"request_id": "r", "epoch": 1, "layout": "0" * 16, "layer": 3, "start": 8, "count": 4, "codec": "raw"}


def config(transport):
    return HandoffConfig(transport=transport, codec="raw", stall_s=1.0, landing_bytes=4 << 20, staging_bytes=4 << 20)


def kv(layer):
    return torch.full((TOKENS, 1, 8), float(layer + 1))


@asynccontextmanager
async def receiving(transport="loopback", key=KEY):
    """A receiver with a guard, one reservation, and what was written to it."""
    guard, written = Guard(key), {}
    receiver = Receiver(LAYOUT, config(transport), worker_id="d", generation="gd", guard=guard)
    await receiver.start()
    ticket = receiver.reserve(
        "r", 1, tokens=TOKENS, codec="raw", budget_s=8.0,
        write=lambda layer, start, keys, values: written.setdefault((layer, start), keys.clone()),
    )  # fmt: skip
    try:
        async with asyncio.timeout(15):
            yield receiver, guard, ticket, written
    finally:
        await receiver.release("r")
        await receiver.close()


async def send(ticket, transport, key):
    sender = Sender(LAYOUT, config(transport), worker_id="p", generation="gp", key=key)
    await sender.start()
    outgoing = sender.open(ticket, tokens=TOKENS, budget_s=8.0, gather=lambda layer, *_: (kv(layer), kv(layer)))
    for layer in range(LAYOUT.layers):
        outgoing.push(layer, 0, TOKENS)
    outgoing.finish(FIRST)
    outcome = await outgoing.outcome()
    await sender.close()
    return outcome


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
async def test_members_hand_over_exactly(transport):
    async with receiving(transport) as (receiver, guard, ticket, written):
        assert isinstance(await send(ticket, transport, KEY), Landed)
        assert isinstance(await receiver.outcome("r"), Landed)
        assert {layer for layer, _ in written} == {0, 1}
        for (layer, _), keys in written.items():
            assert torch.equal(keys, kv(layer))
        assert guard.refused == 0


@pytest.mark.parametrize(
    ("sending", "receiving_key", "reason"),
    [
        (OTHER, KEY, "another cluster key"),
        (None, KEY, "prove|closed|answer"),
        (KEY, None, "during the handshake"),
    ],
)
async def test_without_the_same_key_nothing_is_handed_over(sending, receiving_key, reason):
    async with receiving("loopback", receiving_key) as (receiver, guard, ticket, written):
        outcome = await send(ticket, "loopback", sending)
        assert isinstance(outcome, Lost)
        assert any(part in outcome.reason for part in reason.split("|")), outcome.reason
        assert written == {}
        assert receiver.stats().leases == 1  # still there for whoever may
        assert guard.refused == (receiving_key is not None)


async def test_what_is_said_on_the_control_connection_cannot_be_read():
    """The address of staged memory, and the token that opens it, are in Attach."""
    overheard = bytearray()
    async with receiving("tcp") as (receiver, _, ticket, _):

        async def relay(reader, writer):
            onward_reader, onward = await asyncio.open_connection("127.0.0.1", receiver.port)

            async def pass_on(source, target):
                while data := await source.read(65536):
                    overheard.extend(data)
                    target.write(data)
                target.close()

            await asyncio.gather(pass_on(reader, onward), pass_on(onward_reader, writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert isinstance(await send(dataclasses.replace(ticket, port=port), "tcp", KEY), Landed)
        server.close()
        await asyncio.sleep(0.01)
    assert len(overheard) > 300
    for told in (b"Attach", b"Block", b"127.0.0.1", LAYOUT.fingerprint.encode()):
        assert told not in overheard


class Member:
    """A sender that holds the key and stages genuine blocks, but announces what it likes."""

    def __init__(self, receiver):
        self.receiver, self._key = receiver, BlockKey(KEY)
        self.memory = HostMemory(4096)
        self.exporter = make_exporter("loopback", self.memory, name="x", host="", ucx_tls="")
        self.nbytes = make_codec("raw", LAYOUT).bound(TOKENS)
        self.step = aligned(self.nbytes)
        for layer in range(LAYOUT.layers):
            make_codec("raw", LAYOUT).encode(kv(layer), kv(layer), self.memory.view(layer * self.step, self.nbytes))

    def block(self, layer):
        digest = block_digest(
            self.memory.view(layer * self.step, self.nbytes), request_id="r", epoch=1, layout=LAYOUT.fingerprint,
            layer=layer, start=0, count=TOKENS, codec="raw", key=self._key,
        )  # fmt: skip
        return Block(layer, 0, TOKENS, self.nbytes, digest)

    def parcel(self, seq, *layers):
        """``layers`` follow each other."""
        blocks = tuple(self.block(layer) for layer in layers)
        return Parcel("r", 1, seq, "raw", layers[0] * self.step, blocks)

    async def begin(self):
        stream = await FrameStream.connect("127.0.0.1", self.receiver.port, CONTROL, timeout_s=2.0, key=KEY)
        stream.send(Attach(PROTOCOL, "x", "gx", "gd", LAYOUT.family, LAYOUT.dtype, "loopback", self.exporter.address()))
        while not isinstance(answer := await stream.receive(), Welcome):
            assert isinstance(answer, Alive), answer
        stream.send(Begin("r", 1, TOKENS, "raw"))
        return stream


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({}, ""),
        ({"layer": 1}, "digest mismatch"),
        ({"layer": 7}, "refused"),
        ({"start": 1}, "refused"),
        ({"start": 1, "count": 3, "nbytes": 192}, "digest mismatch"),
        ({"count": 3}, "256 bytes, at most 192"),
        ({"count": 3, "nbytes": 192}, "digest mismatch"),
        ({"seq": 1}, "expected 0"),
        ({"codec": "lossless"}, "codec lossless"),
        ({"offset": 64}, "digest mismatch"),
        ({"offset": 256}, "digest mismatch"),  # the genuine bytes of the other layer
        ({"nbytes": 128}, "digest mismatch"),
        ({"digest": bytes(DIGEST_BYTES)}, "digest mismatch"),
        ({"digest": b""}, "no digest"),
        ({"request_id": "q"}, "unheard"),
        ({"epoch": 2}, "unheard"),
    ],
)
async def test_every_field_of_a_parcel_is_bound(alter, change, lost):
    async with receiving() as (receiver, _, _, written):
        member = Member(receiver)
        stream = await member.begin()
        stream.send(alter(member.parcel(0, 0), change))
        if lost == "unheard":  # another request's, or another attempt's: it changes nothing here
            stream.send(Commit("r", 1, 0, FIRST, 0.0, 0.0))
            lost = "commit of 0 parcels refused: 0 announced"
        elif not lost:
            stream.send(member.parcel(1, 1))
            stream.send(Commit("r", 1, 2, FIRST, 0.0, 0.0))
            assert isinstance(await receiver.outcome("r"), Landed)
            assert torch.equal(written[0, 0], kv(0))
            await stream.close()
            return
        outcome = await receiver.outcome("r")
        assert isinstance(outcome, Lost)
        assert lost in outcome.reason
        assert written == {}
        await stream.close()


async def test_blocks_of_one_parcel_land_together():
    async with receiving() as (receiver, _, _, written):
        member = Member(receiver)
        stream = await member.begin()
        stream.send(member.parcel(0, 0, 1))
        stream.send(Commit("r", 1, 1, FIRST, 0.0, 0.0))
        assert isinstance(await receiver.outcome("r"), Landed)
        assert all(torch.equal(written[layer, 0], kv(layer)) for layer in (0, 1))
        answer = await stream.receive()
        assert isinstance(answer, Ack)
        assert (answer.request_id, answer.epoch, answer.seq) == ("r", 1, 0)
        await stream.close()


async def test_a_wrong_block_is_not_written_and_loses_the_handoff_behind_a_right_one():
    async with receiving() as (receiver, _, _, written):
        member = Member(receiver)
        stream = await member.begin()
        announced = member.parcel(0, 0, 1)
        member.memory.view(member.step, 1)[:] = b"x"
        stream.send(announced)
        outcome = await receiver.outcome("r")
        assert isinstance(outcome, Lost)
        assert "parcel 0: digest mismatch" in outcome.reason
        assert set(written) == {(0, 0)}
        await stream.close()


async def test_bytes_that_fit_an_open_digest_do_not_fit_a_keyed_one():
    """Somebody on the data path replaces the bytes, and would have to replace the digest too."""
    async with receiving() as (receiver, _, _, written):
        member = Member(receiver)
        stream = await member.begin()
        announced = member.parcel(0, 0)
        member.memory.view(0, 4)[:] = b"evil"
        stream.send(announced)
        outcome = await receiver.outcome("r")
        assert isinstance(outcome, Lost)
        assert "digest mismatch" in outcome.reason
        assert written == {}
        await stream.close()


@pytest.mark.parametrize("key", [None, BlockKey(KEY)], ids=["open", "keyed"])
def test_every_field_and_every_bit_changes_the_digest(key):
    data = memoryview(bytearray(range(100)))
    digests = [block_digest(data, key=key, **PLACE)]
    for name, value in PLACE.items():
        digests.append(
            block_digest(data, key=key, **PLACE | {name: value + 1 if isinstance(value, int) else value + "1"})
        )
    for bit in range(0, 800, 7):
        data[bit // 8] ^= 1 << bit % 8
        digests.append(block_digest(data, key=key, **PLACE))
        data[bit // 8] ^= 1 << bit % 8
    digests += [
        block_digest(data[:99], key=key, **PLACE),
        block_digest(memoryview(bytes(data) + b"\0"), key=key, **PLACE),
    ]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}
    assert block_digest(data, key=key, **PLACE) == digests[0]


def test_a_keyed_digest_needs_the_key():
    data = memoryview(bytearray(range(100)))
    keyed, other = (block_digest(data, key=BlockKey(key), **PLACE) for key in (KEY, OTHER))
    assert len({keyed, other, block_digest(data, **PLACE), xxhash.xxh3_128_digest(bytes(data))}) == 4
