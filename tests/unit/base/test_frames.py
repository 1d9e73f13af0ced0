"""Frames over real sockets: everything arrives in order, nothing else gets in, and no peer can make the other wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from baton import frames
from baton.errors import ProtocolError, Unavailable
from baton.frames import FrameStream
from baton.messages import PLANE, Cancel, Tokens
from baton.records import pack
from baton.request import TokenEvent

HOST = "127.0.0.1"
Open = Callable[[], Awaitable[tuple[FrameStream, FrameStream]]]


@pytest.fixture
async def pair() -> AsyncIterator[Open]:
    """Opens connections: (the caller's end, the listener's end)."""
    accepted: asyncio.Queue[FrameStream] = asyncio.Queue()
    ends: list[FrameStream] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(FrameStream(reader, writer, PLANE))

    server = await asyncio.start_server(accept, HOST, 0)
    port = server.sockets[0].getsockname()[1]

    async def connect() -> tuple[FrameStream, FrameStream]:
        near = await FrameStream.connect(HOST, port, PLANE, timeout_s=5.0)
        far = await asyncio.wait_for(accepted.get(), 5.0)
        ends.extend((near, far))
        return near, far

    yield connect
    for end in ends:
        end.abort()
    server.close()
    await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def raw_sender() -> AsyncIterator[tuple[FrameStream, asyncio.StreamWriter]]:
    """A framed end whose peer writes whatever bytes it likes."""
    ends: asyncio.Queue[FrameStream] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.put_nowait(FrameStream(reader, writer, PLANE))

    server = await asyncio.start_server(accept, HOST, 0)
    _, writer = await asyncio.open_connection(HOST, server.sockets[0].getsockname()[1])
    end = await ends.get()
    try:
        yield end, writer
    finally:
        end.abort()
        writer.transport.abort()
        server.close()
        await asyncio.sleep(0)


async def receive(stream: FrameStream) -> object:
    return await asyncio.wait_for(stream.receive(), 5.0)


async def test_records_arrive_in_order_both_ways(pair: Open) -> None:
    near, far = await pair()
    for index in range(500):
        near.send(Cancel(f"n{index}"))
        far.send(Cancel(f"f{index}"))
    for index in range(500):
        assert await receive(far) == Cancel(f"n{index}")
        assert await receive(near) == Cancel(f"f{index}")


async def test_a_large_record_crosses_whole(pair: Open) -> None:
    near, far = await pair()
    record = Tokens(tuple(TokenEvent(f"request-{index}", index, index) for index in range(50_000)))
    near.send(record)
    assert await receive(far) == record


async def test_the_end_of_the_stream_is_none(pair: Open) -> None:
    near, far = await pair()
    near.send(Cancel("last"))
    await near.close()
    assert await receive(far) == Cancel("last")
    assert await receive(far) is None
    assert await receive(far) is None


async def test_an_abort_is_the_end_too(pair: Open) -> None:
    near, far = await pair()
    near.abort()
    assert await receive(far) is None


async def test_sending_on_a_closed_connection_is_unavailable(pair: Open) -> None:
    near, _ = await pair()
    await near.close()
    with pytest.raises(Unavailable, match="is closed"):
        near.send(Cancel("late"))


async def test_a_peer_that_does_not_read_is_cut_off_not_buffered(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_UNSENT_BYTES", 1 << 20)
    near, _ = await pair()

    def send_until_refused() -> None:
        for _ in range(1000):  # the kernel's buffers take some of it
            near.send(Cancel("r" * 100_000))

    with pytest.raises(Unavailable, match="does not read"):
        send_until_refused()
    with pytest.raises(Unavailable, match="is closed"):
        near.send(Cancel("after"))


async def test_a_record_above_the_limit_is_not_sent(pair: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    near, far = await pair()
    with pytest.raises(ProtocolError, match=r"Cancel of 20\d\d bytes exceeds 1000"):
        near.send(Cancel("r" * 2000))
    near.send(Cancel("fine"))
    assert await receive(far) == Cancel("fine")


async def test_a_length_above_the_limit_is_refused_before_anything_is_read() -> None:
    async with raw_sender() as (end, writer):
        writer.write(struct.pack("<I", frames.MAX_FRAME_BYTES + 1))
        with pytest.raises(ProtocolError, match="exceeds"):
            await receive(end)


async def test_bytes_that_are_no_record_are_a_protocol_error() -> None:
    async with raw_sender() as (end, writer):
        writer.write(struct.pack("<I", 5) + b"\xc1aaaa")
        with pytest.raises(ProtocolError, match="not msgpack"):
            await receive(end)


async def test_a_frame_in_single_bytes_arrives() -> None:
    body = pack(Cancel("slow"))
    async with raw_sender() as (end, writer):
        for byte in struct.pack("<I", len(body)) + body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert await receive(end) == Cancel("slow")


@pytest.mark.parametrize("sent", [b"\x05\x00", b"\x05\x00\x00\x00\x92\xa6"])
async def test_a_stream_that_ends_inside_a_frame_has_ended(sent: bytes) -> None:
    async with raw_sender() as (end, writer):
        writer.write(sent)
        writer.close()
        assert await receive(end) is None


async def test_nobody_listening_is_unavailable_with_the_address() -> None:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port = sock.getsockname()[1]
        with pytest.raises(Unavailable, match=f"cannot connect to {HOST}:{port}"):
            await FrameStream.connect(HOST, port, PLANE, timeout_s=2.0)


async def test_connecting_has_a_deadline() -> None:
    with socket.socket() as full:
        full.bind((HOST, 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # a backlog that nobody accepts from: further handshakes stay unanswered
            filler.setblocking(False)
            filler.connect_ex((HOST, port))
        try:
            with pytest.raises(Unavailable, match="timed out"):
                await FrameStream.connect(HOST, port, PLANE, timeout_s=0.2)
        finally:
            for filler in fillers:
                filler.close()


async def test_leaving_the_block_closes_the_connection(pair: Open) -> None:
    near, far = await pair()
    async with near:
        assert near.peer.startswith(f"{HOST}:")
    assert await receive(far) is None
