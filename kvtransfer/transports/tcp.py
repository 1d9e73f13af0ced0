"""Plain sockets: the exporter serves ranges of its memory, the fetcher receives straight into the landing memory.

A fetch that is given up closes its socket, after which nothing can write the landing range: no quarantine is needed.

    address   msgpack [host, port, token, bytes exported]
    hello     16-byte token; a process that merely got the same port does not know it
    request   u64 offset, u64 length            answer   u64 length, then the bytes; length 0: refused
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
import threading
import time

import msgpack

from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, check_range

log = logging.getLogger(__name__)

_REQUEST = struct.Struct("<QQ")
_ANSWER = struct.Struct("<Q")
_TOKEN_BYTES = 16
_HELLO_S = 5.0
_SEND_S = 60.0  # a reader slower than this for one range is cut off
_MAX_READERS = 256
_SOCKET_BYTES = 4 << 20


class TcpExporter:
    """Serves every reader from a thread of its own."""

    def __init__(self, memory: HostMemory, *, host: str) -> None:
        self._memory = memory
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((host, 0), backlog=64)
        self._address: bytes = msgpack.packb([host, self._listener.getsockname()[1], self._token, memory.nbytes])
        self._readers: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="kv-export", daemon=True)
        self._acceptor.start()

    def address(self) -> bytes:
        return self._address

    def _accept(self) -> None:
        while True:
            try:
                reader, peer = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self._closed or len(self._readers) >= _MAX_READERS:
                    log.warning("kv export: reader %s refused, %d connected", peer, len(self._readers))
                    reader.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(reader,), name="kv-export-reader", daemon=True)
                self._readers[reader] = thread
            thread.start()

    def _serve(self, reader: socket.socket) -> None:
        try:
            with reader, contextlib.suppress(OSError):
                reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
                reader.settimeout(_HELLO_S)
                if not secrets.compare_digest(_receive(reader, _TOKEN_BYTES), self._token):
                    return
                while True:
                    reader.settimeout(None)
                    request = _receive(reader, _REQUEST.size)
                    reader.settimeout(_SEND_S)
                    self._answer(reader, *_REQUEST.unpack(request))
        finally:
            with self._lock:
                self._readers.pop(reader, None)

    def _answer(self, reader: socket.socket, offset: int, nbytes: int) -> None:
        if nbytes == 0 or offset + nbytes > self._memory.nbytes:
            reader.sendall(_ANSWER.pack(0))
            return
        reader.sendall(_ANSWER.pack(nbytes), socket.MSG_MORE)
        reader.sendall(self._memory.view(offset, nbytes))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            readers = list(self._readers.items())
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for reader, _ in readers:
            with contextlib.suppress(OSError):
                reader.shutdown(socket.SHUT_RDWR)
        for thread in (self._acceptor, *(thread for _, thread in readers)):
            thread.join(timeout=_HELLO_S)


def _receive(sock: socket.socket, nbytes: int) -> bytes:
    """Exactly ``nbytes``; raises OSError at the end of the stream."""
    data = bytearray(nbytes)
    _receive_into(sock, memoryview(data), None)
    return bytes(data)


def _receive_into(sock: socket.socket, view: memoryview, deadline: float | None) -> None:
    while len(view) > 0:
        if deadline is not None:
            sock.settimeout(max(1e-3, deadline - time.monotonic()))
        received = sock.recv_into(view)
        if received == 0:
            raise ConnectionResetError("connection closed")
        view = view[received:]
        if deadline is not None and len(view) > 0 and time.monotonic() >= deadline:
            raise TimeoutError("timed out")


class TcpFetcher:
    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory

    def connect(self, address: bytes, deadline_s: float) -> TcpSource:
        try:
            host, port, token, exported = msgpack.unpackb(address, max_array_len=4, max_ext_len=0)
            valid = isinstance(host, str) and type(port) is int and isinstance(token, bytes) and type(exported) is int
        except (ValueError, TypeError, msgpack.UnpackException):
            valid = False
        if not valid or not 0 < port < 65536 or len(token) != _TOKEN_BYTES:
            raise FetchLost("not a tcp address")
        try:
            sock = socket.create_connection((host, port), timeout=deadline_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
            sock.sendall(token)
        except OSError as error:
            raise FetchLost(f"cannot connect to {host}:{port}: {error}") from None
        return TcpSource(sock, self._memory, exported)

    def close(self) -> None:
        pass


class TcpSource:
    def __init__(self, sock: socket.socket, landing: HostMemory, exported: int) -> None:
        self._sock, self._landing, self._exported = sock, landing, exported

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> None:
        check_range(offset, nbytes, self._exported)
        deadline = time.monotonic() + deadline_s
        try:
            self._sock.settimeout(deadline_s)
            self._sock.sendall(_REQUEST.pack(offset, nbytes))
            head = bytearray(_ANSWER.size)
            _receive_into(self._sock, memoryview(head), deadline)
            if _ANSWER.unpack(head)[0] != nbytes:
                raise ConnectionResetError("the peer refused the range")
            _receive_into(self._sock, self._landing.view(at, nbytes), deadline)
        except OSError as error:
            # A stream that stopped mid-answer cannot be used again; closing it is what fences the landing range.
            self._sock.close()
            raise FetchLost(f"tcp fetch of {nbytes} bytes: {error}") from None

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
