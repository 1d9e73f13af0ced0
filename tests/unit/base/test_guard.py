"""Who gets into a process, over real sockets, with whoever likes in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from baton import guard as guard_module
from baton.errors import Unavailable
from baton.frames import FrameStream
from baton.guard import Guard
from baton.messages import PLANE, Cancel
from baton.records import Registry
from baton.secure import HELLO_BYTES, PROOF_BYTES, ClusterKey, Untrusted

HOST = "127.0.0.1"
SECRET = "a key that no log may show, ever"
KEY, OTHER = ClusterKey(SECRET), ClusterKey("x" * 40)
CONTROL = Registry(Cancel)
OPENING = HELLO_BYTES + PROOF_BYTES  # what the connecting end says before its first frame


class Door:
    """Accepts as a worker does; ``ends`` gets every stream let in, and None for every connection turned away."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.ends: asyncio.Queue[FrameStream | None] = asyncio.Queue()
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.put_nowait(await self.guard.accept(reader, writer, PLANE))

    async def end(self) -> FrameStream | None:
        return await asyncio.wait_for(self.ends.get(), 8.0)


@contextlib.asynccontextmanager
async def opened(key: ClusterKey | None = KEY) -> AsyncIterator[Door]:
    door = Door(Guard(key))
    server = await asyncio.start_server(door.answer, HOST, 0)
    door.port = server.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(20):
            yield door
    finally:
        server.close()
        door.guard.close()
        while not door.ends.empty():
            end = door.ends.get_nowait()
            if end is not None:
                end.abort()
        await asyncio.sleep(0)


async def connect(port: int, key: ClusterKey | None = KEY, registry: Registry = PLANE) -> FrameStream:
    return await FrameStream.connect(HOST, port, registry, timeout_s=2.0, key=key)


async def test_members_talk_both_ways() -> None:
    async with opened() as door, await connect(door.port) as near:
        far = await door.end()
        assert far is not None
        near.send(Cancel("there"))
        far.send(Cancel("back"))
        assert await far.receive() == Cancel("there")
        assert await near.receive() == Cancel("back")
        near.send(Cancel("r" * (guard_module.MAX_PENDING << 10)))
        assert await far.receive() == Cancel("r" * (guard_module.MAX_PENDING << 10))
        far.abort()
        assert door.guard.refused == 0


async def test_another_key_is_turned_away_counted_and_logged_without_it(caplog: pytest.LogCaptureFixture) -> None:
    async with opened() as door:
        with pytest.raises(Unavailable, match="another cluster key"):
            await connect(door.port, OTHER)
        assert await door.end() is None
        assert door.guard.refused == 1
    assert caplog.text.count(" refused: ") == 1
    assert SECRET not in caplog.text


async def test_a_peer_without_a_key_gets_nothing_and_a_peer_with_one_refuses_an_open_port() -> None:
    async with opened() as door:
        stranger = await connect(door.port, None)
        stranger.send(Cancel("let me in, I am a router of the right version"))
        assert await stranger.receive() is None
        assert await door.end() is None
        stranger.abort()
    async with opened(None) as door:

        async def read() -> None:
            far = await door.end()
            assert far is not None
            with contextlib.suppress(Exception):
                await far.receive()
            far.abort()

        reading = asyncio.create_task(read())
        with pytest.raises(Unavailable, match="during the handshake"):
            await connect(door.port)
        await reading


async def test_a_port_that_speaks_other_records_is_refused() -> None:
    async with opened() as door:
        with pytest.raises(Unavailable, match="during the handshake"):
            await connect(door.port, registry=CONTROL)
        assert await door.end() is None


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * HELLO_BYTES, b"\xff" * 4096, b"BTN\1\0" + b"\7" * 40]
)
async def test_whatever_else_is_said_is_refused_without_waiting_for_more(said: bytes) -> None:
    async with opened() as door:
        reader, writer = await asyncio.open_connection(HOST, door.port)
        writer.write(said)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        assert await door.end() is None
        writer.transport.abort()


async def test_a_peer_that_says_nothing_is_cut_off_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "HANDSHAKE_S", 0.2)
    async with opened() as door:
        _, silent = await asyncio.open_connection(HOST, door.port)
        _, half = await asyncio.open_connection(HOST, door.port)
        half.write(b"BTN")
        assert await door.end() is None
        assert await door.end() is None
        assert door.guard.refused == 2
        silent.transport.abort()
        half.transport.abort()


async def test_strangers_that_dawdle_do_not_keep_members_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "MAX_PENDING", 4)
    async with opened() as door:
        strangers = [(await asyncio.open_connection(HOST, door.port))[1] for _ in range(12)]
        async with await connect(door.port):
            turned_away = 0
            while (end := await door.end()) is None:
                turned_away += 1
            end.abort()
            assert turned_away <= 9
        for stranger in strangers:
            stranger.transport.abort()


async def test_closing_ends_handshakes_under_way() -> None:
    async with opened() as door:
        _, silent = await asyncio.open_connection(HOST, door.port)
        await asyncio.sleep(0.05)
        door.guard.close()
        assert await door.end() is None
        silent.transport.abort()


async def test_refusals_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with opened() as door:
        for _ in range(20):
            with pytest.raises(Unavailable):
                await connect(door.port, OTHER)
            assert await door.end() is None
        assert door.guard.refused == 20
    assert caplog.text.count(" refused: ") <= 3


# ---- somebody on the wire between two members

Change = Callable[[bytes], bytes]


@contextlib.asynccontextmanager
async def between(port: int, change: Change) -> AsyncIterator[int]:
    """A port that passes everything on to ``port``, what the connecting end says changed as a whole by ``change``,
    which gets all bytes after the opening at once, as soon as 0.1 s pass without more of them."""
    links: list[asyncio.StreamWriter] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward = await asyncio.open_connection(HOST, port)
        links.extend((writer, onward))

        async def back() -> None:
            while data := await onward_reader.read(65536):
                writer.write(data)

        returning = asyncio.create_task(back())
        onward.write(await reader.readexactly(HELLO_BYTES))
        onward.write(await reader.readexactly(PROOF_BYTES))
        frames = b""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.1):
                    frames += await reader.read(65536)
        onward.write(change(frames))
        onward.write_eof()
        await returning

    server = await asyncio.start_server(relay, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for link in links:
            link.transport.abort()
        await asyncio.sleep(0.01)


async def received_through(change: Change) -> tuple[list[object], bool]:
    """What arrives of three records sent through ``change``, and whether the end was an error."""
    async with opened() as door, between(door.port, change) as port:
        near = await connect(port)
        far = await door.end()
        assert far is not None
        for name in ("a", "b", "c"):
            near.send(Cancel(name))
        got: list[object] = []
        try:
            while (record := await asyncio.wait_for(far.receive(), 5.0)) is not None:
                got.append(record)
        except Untrusted:
            return got, True
        finally:
            far.abort()
            near.abort()
        return got, False


def split(frames: bytes) -> list[bytes]:
    size = len(frames) // 3
    return [frames[:size], frames[size : 2 * size], frames[2 * size :]]


A, B, C = Cancel("a"), Cancel("b"), Cancel("c")


@pytest.mark.parametrize(
    ("change", "arrives", "error"),
    [
        (lambda frames: frames, [A, B, C], False),
        (lambda frames: frames + split(frames)[0], [A, B, C], True),  # replayed
        (lambda frames: b"".join(split(frames)[i] for i in (0, 2, 1)), [A], True),  # reordered
        (lambda frames: b"".join(split(frames)[i] for i in (1, 2)), [], True),  # the first dropped
        (lambda frames: split(frames)[0] + split(frames)[2], [A], True),  # one dropped
        (lambda frames: frames[: len(frames) // 3], [A], False),  # cut at a frame's end: the end, as of a dead peer
        (lambda frames: frames[:-3], [A, B], False),  # cut inside a frame
        (lambda frames: frames[:-1] + bytes([frames[-1] ^ 1]), [A, B], True),  # one bit
        (lambda frames: bytes([frames[0] - 1]) + frames[1:], [], True),  # one byte shorter, says the length
        (lambda frames: b"", [], False),
    ],
)
async def test_what_somebody_changes_on_the_wire_is_never_taken(
    change: Change, arrives: list[object], error: bool
) -> None:
    assert await received_through(change) == (arrives, error)
