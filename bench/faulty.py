"""A man in the middle of a handoff over plain TCP: delays, cuts, and flips bits of the KV that passes through it.

It listens for a sender's control connection, passes it on to the receiver, and puts itself into the data connection's
address as that goes by in ``Attach``.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import msgpack

from baton.records import pack
from kvtransfer.protocol import CONTROL, Attach

Trouble = Literal["delay", "stall", "cut", "flip"]
_LENGTH = struct.Struct("<I")  # of a control frame
_CHUNK_BYTES = 1 << 16
_DELAY_S = 0.03  # of one chunk


@dataclass(frozen=True, slots=True)
class Fault:
    """``trouble`` on the data or the control connection, once ``after_bytes`` have passed to the receiver."""

    trouble: Trouble
    where: Literal["data", "control"]
    after_bytes: int


class FaultyLink:
    """Stands before the receiver at ``host:port``; senders connect to ``port`` of this. Use ``with``."""

    def __init__(self, host: str, port: int, fault: Fault, seed: int) -> None:
        self._fault, self._random = fault, random.Random(seed)
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = False
        self._passed = 0
        self.port = self._listen((host, port), self._control)

    def close(self) -> None:
        """Cuts every connection."""
        with self._lock:
            self._closed = True
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _listen(self, target: tuple[str, int], serve: Callable[[socket.socket, socket.socket], None]) -> int:
        """Accepts any number of connections, each served against one to ``target``; returns the port."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._keep(listener)
        port = int(listener.getsockname()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    near, _ = listener.accept()
                    far = socket.create_connection(target, timeout=5.0)
                    far.settimeout(None)
                    if self._keep(near) and self._keep(far):
                        serve(near, far)

        threading.Thread(target=accept, name="faulty", daemon=True).start()
        return port

    def _keep(self, sock: socket.socket) -> bool:
        """False, and the socket closed, when the link is."""
        with self._lock:
            if not self._closed:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(sock)
                return True
        sock.close()
        return False

    def _control(self, sender: socket.socket, receiver: socket.socket) -> None:
        (length,) = _LENGTH.unpack(_exactly(sender, _LENGTH.size))
        attach = CONTROL.unpack(_exactly(sender, length))
        if isinstance(attach, Attach) and attach.transport == "tcp":
            host, port, *rest = msgpack.unpackb(attach.address)
            own = self._listen((host, port), self._data)
            attach = replace(attach, address=msgpack.packb(["127.0.0.1", own, *rest]))
        body = pack(attach)
        receiver.sendall(_LENGTH.pack(len(body)) + body)
        self._pump(sender, receiver, faulty=self._fault.where == "control")
        self._pump(receiver, sender, faulty=False)

    def _data(self, reader: socket.socket, exporter: socket.socket) -> None:
        self._pump(reader, exporter, faulty=False)
        self._pump(exporter, reader, faulty=self._fault.where == "data")

    def _pump(self, source: socket.socket, target: socket.socket, *, faulty: bool) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(_CHUNK_BYTES):
                    target.sendall(self._harm(data) if faulty else data)
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=run, name="faulty", daemon=True).start()

    def _harm(self, data: bytes) -> bytes:
        """What arrives of ``data``; raises ConnectionError to cut."""
        self._passed += len(data)
        if self._passed <= self._fault.after_bytes:
            return data
        match self._fault.trouble:
            case "delay":
                time.sleep(_DELAY_S)
            case "stall":
                while not self._closed:
                    time.sleep(0.05)
            case "cut":
                raise ConnectionError("cut")
            case "flip":
                harmed = bytearray(data)
                harmed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                return bytes(harmed)
        return data


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = sock.recv(nbytes, socket.MSG_WAITALL)
    if len(data) < nbytes:
        raise ConnectionError("closed")
    return data
