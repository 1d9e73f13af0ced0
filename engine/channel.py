"""Records between rank 0 and another rank: msgpack over one end of a Unix seqpacket pair.

A seqpacket message arrives whole or not at all, and the end of either process is an end of file for the other. Its size
is limited by the socket's buffer, so a long record goes in several messages; the first byte of each says whether more
follow.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from types import TracebackType

from baton.errors import ProtocolError
from baton.records import Registry, pack
from engine.runner import Step

MESSAGE_BYTES = 64 << 10  # well below net.core.wmem_default of any Linux (212,992)
MAX_RECORD_BYTES = 64 << 20  # a step of a million tokens with all their pages
SEND_TIMEOUT_S = 10.0
LAST, MORE = b"\0", b"\1"


@dataclass(frozen=True, slots=True)
class Task:
    """Which rank a process is to be, of which model, with what cache."""

    rank: int
    ranks: int
    folder: str
    dtype: str
    threads: int
    max_context: int | None
    pages: int
    page_tokens: int
    means: str  # one of engine.devices.Means
    parent: int  # process id of rank 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank has loaded its slice and waits for steps."""

    rank: int


@dataclass(frozen=True, slots=True)
class Connect:
    """All ranks are ready; those that share no memory meet here."""

    port: int  # of 127.0.0.1


@dataclass(frozen=True, slots=True)
class Gather:
    """Copy tokens ``[start, start + count)`` of ``pages`` to the staging memory (:mod:`engine.private_cache`)."""

    layer: int
    pages: tuple[int, ...]
    start: int
    count: int
    after: int  # sums: not before the rank has made so many


@dataclass(frozen=True, slots=True)
class Scatter:
    """Copy what the staging memory holds to tokens ``[start, start + count)`` of ``pages``."""

    layer: int
    pages: tuple[int, ...]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Copied:
    """The rank has done what the last :class:`Gather` or :class:`Scatter` asked."""

    count: int


RECORDS = Registry(Task, Ready, Connect, Step, Gather, Scatter, Copied)


class Channel:
    """One end. ``peer`` names the other in errors."""

    def __init__(self, end: socket.socket, *, peer: str) -> None:
        self._socket, self._peer = end, peer
        self._buffer = bytearray(1 + MESSAGE_BYTES)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection itself, so that the peer sees it even while a copy of the descriptor is open elsewhere:
        in a process that was forked meanwhile, say."""
        with contextlib.suppress(OSError):  # the peer, or an earlier call, has ended it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, record: object) -> None:
        """Raises TimeoutError when the peer takes nothing for ``SEND_TIMEOUT_S``, OSError when it is gone."""
        self.send_packed(pack(record))

    def send_packed(self, body: bytes) -> None:
        """As :meth:`send`, of a record that goes to several peers and was packed once."""
        self._socket.settimeout(SEND_TIMEOUT_S)
        for start in range(0, len(body), MESSAGE_BYTES):
            piece = body[start : start + MESSAGE_BYTES]
            self._socket.send((MORE if start + MESSAGE_BYTES < len(body) else LAST) + piece)

    def receive(self, timeout_s: float) -> object | None:
        """The next record, or None when the peer has closed its end or died. Raises TimeoutError when nothing comes.

        A record that has begun is waited for: its pieces would be lost with a timeout between them.
        """
        deadline_s, body = time.monotonic() + timeout_s, bytearray()
        while True:
            self._socket.settimeout(max(deadline_s - time.monotonic(), 1e-3))
            try:
                size = self._socket.recv_into(self._buffer)
            except ConnectionResetError:  # it died with unread messages
                return None
            if size == 0:
                return None
            body += memoryview(self._buffer)[1:size]
            deadline_s = time.monotonic() + SEND_TIMEOUT_S
            if len(body) > MAX_RECORD_BYTES:
                raise ProtocolError(f"{self._peer} sent more than {MAX_RECORD_BYTES} bytes in one record")
            if self._buffer[:1] == LAST:
                record: object = RECORDS.unpack(bytes(body))
                return record
