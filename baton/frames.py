"""Length-prefixed frames over a TCP stream: the token plane and the handoff's control connection speak these.

A frame is a 4-byte little-endian length and that many bytes. One writer task is not needed: ``send`` appends to the
transport's buffer, which is bounded; a peer that does not read is cut off rather than buffered without end.

Between members of a cluster the connection begins with the handshake of ``baton.secure`` and every frame is sealed.
Connections are opened by :meth:`FrameStream.connect` and accepted by :class:`baton.guard.Guard`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any, Self

from baton.errors import ProtocolError, Unavailable
from baton.handshake import Seals, prove
from baton.records import Registry, pack
from baton.secure import TAG_BYTES, ClusterKey, Untrusted

MAX_FRAME_BYTES = 16 << 20
MAX_UNSENT_BYTES = 64 << 20
READ_BYTES = 64 << 10  # taken from the connection at once: all the frames that have come
_HEADER = struct.Struct("<I")


class FrameStream:
    """One connection that carries records of one :class:`Registry` both ways; close it or use ``async with``."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        registry: Registry,
        seals: Seals | None = None,
    ) -> None:
        """``seals``: what the handshake agreed on; None leaves frames open."""
        self._reader, self._writer, self._registry = reader, writer, registry
        self._unread = bytearray()  # at most one frame and what was read behind it
        self._sending = seals[0] if seals else None
        self._receiving = seals[1] if seals else None
        self._max_body = MAX_FRAME_BYTES + (TAG_BYTES if seals else 0)
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    async def connect(
        cls, host: str, port: int, registry: Registry, *, timeout_s: float, key: ClusterKey | None = None
    ) -> FrameStream:
        """Connects within ``timeout_s``, both ends proving ``key`` unless it is None; raises :class:`Unavailable`."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    seals = None if key is None else await prove(reader, writer, key, registry.fingerprint)
                except BaseException:
                    writer.transport.abort()
                    raise
        except (OSError, TimeoutError, Untrusted) as error:
            raise Unavailable(f"cannot connect to {host}:{port}: {str(error) or 'timed out'}") from None
        return cls(reader, writer, registry, seals)

    @property
    def peer(self) -> str:
        name = self._writer.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if name else "?"

    def send(self, *records: object) -> None:
        """Queues records, in one write; raises :class:`Unavailable` when the peer is gone or has stopped reading."""
        bodies = [_packed(record) for record in records]
        transport = self._writer.transport
        if transport.is_closing():
            raise Unavailable(f"connection to {self.peer} is closed")
        if transport.get_write_buffer_size() + sum(map(len, bodies)) > MAX_UNSENT_BYTES:
            self.abort()
            raise Unavailable(f"{self.peer} does not read; connection cut")
        if self._sending is not None:
            bodies = [self._sending.close(body) for body in bodies]
        transport.write(b"".join(_HEADER.pack(len(body)) + body for body in bodies))

    async def receive(self) -> Any | None:
        """The next record, or None at the end of the stream. Raises :class:`ProtocolError` for bad bytes.

        The end may be an attacker's cut: whoever reads takes it for the peer's failure, never for a success.
        """
        while (body := self._frame()) is None:
            try:
                came = await self._reader.read(READ_BYTES)
            except (ConnectionError, TimeoutError):
                return None
            if not came:
                return None
            self._unread += came
        return self._registry.unpack(body if self._receiving is None else self._receiving.open(body))

    def _frame(self) -> bytes | None:
        """The body of the next frame if all of it has come."""
        unread = self._unread
        if len(unread) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(unread)
        if length > self._max_body:
            raise ProtocolError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
        end = _HEADER.size + length
        if len(unread) < end:
            return None
        body = bytes(unread[_HEADER.size : end])
        del unread[:end]
        return body

    def abort(self) -> None:
        """Drops the connection at once, unsent bytes included."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _packed(record: object) -> bytes:
    body = pack(record)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"{type(record).__name__} of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return body
