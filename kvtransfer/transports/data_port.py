"""The exporter's listening socket and the way in: TLS where configured, then a token that only this process gave out.

address   msgpack [host, port, token, bytes exported, whether TLS]
proof     of the token, both ways, which never crosses this connection itself: kvtransfer.transports.proof
welcome   u64 bytes exported
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable

import msgpack

from baton.config_handoff import TlsConfig
from kvtransfer.transports import FetchLost
from kvtransfer.transports.proof import MAC_BYTES, NONCE_BYTES, Proof, check, nonce
from kvtransfer.transports.tls import server_context

log = logging.getLogger(__name__)

_WELCOME = struct.Struct("<Q")
_TOKEN_BYTES = 16
_HELLO_S = 5.0
_MAX_READERS = 256
_SOCKET_BYTES = 4 << 20


class DataPort:
    """Calls ``serve(socket, proof)`` on a thread of its own for every reader that knows the token; OSError from it ends
    that reader only, and so does its return."""

    def __init__(
        self, serve: Callable[[socket.socket, Proof], None], *, exported: int, host: str, tls: TlsConfig
    ) -> None:
        self._serve, self._exported = serve, exported
        self._context = server_context(tls) if tls.on else None
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((host, 0), backlog=64)
        self.address: bytes = msgpack.packb([host, self._listener.getsockname()[1], self._token, exported, tls.on])
        self._readers: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="kv-export", daemon=True)
        self._acceptor.start()

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
                thread = threading.Thread(target=self._run, args=(reader,), name="kv-export-reader", daemon=True)
                self._readers[thread] = reader
            thread.start()

    def _run(self, reader: socket.socket) -> None:
        try:
            reader, proof = self._welcome(reader)
            with contextlib.suppress(OSError):
                self._serve(reader, proof)
        except OSError as error:
            log.warning("kv export: a reader was refused: %s", error)
        finally:
            reader.close()
            with self._lock:
                del self._readers[threading.current_thread()]

    def _welcome(self, reader: socket.socket) -> tuple[socket.socket, Proof]:
        """The connection to a reader that proved itself, and what its requests are checked with; raises OSError."""
        reader.settimeout(_HELLO_S)
        reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        if self._context is not None:
            reader = self._context.wrap_socket(reader, server_side=True)
            with self._lock:
                self._readers[threading.current_thread()] = reader  # the plain socket object is empty now
        with contextlib.ExitStack() as unless_welcome:
            unless_welcome.callback(reader.close)
            ours = nonce()
            reader.sendall(ours)
            proof = Proof(self._token, ours, receive(reader, NONCE_BYTES, None))
            check(receive(reader, MAC_BYTES, None), proof.of_reader, "its proof")
            if self._closed:
                raise ConnectionAbortedError("the exporter closes")
            reader.sendall(proof.of_exporter + _WELCOME.pack(self._exported))
            unless_welcome.pop_all()
        return reader, proof

    def close(self) -> None:
        with self._lock:
            self._closed = True
            readers = list(self._readers.items())
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for _, reader in readers:
            cut(reader)
        for thread in (self._acceptor, *(thread for thread, _ in readers)):
            thread.join(timeout=_HELLO_S)


def dial(
    address: bytes, *, transport: str, tls: ssl.SSLContext | None, deadline_s: float
) -> tuple[socket.socket, Proof, int]:
    """A connection to the :class:`DataPort` at ``address``, what signs its requests, and how many bytes it exports;
    raises FetchLost."""
    host, port, token, exported, encrypted = _parsed(address, transport)
    if encrypted != (tls is not None):
        theirs, ours = ("TLS", "plain tcp") if encrypted else ("plain tcp", "TLS")
        raise FetchLost(f"the peer at {host}:{port} speaks {theirs}, this worker {ours}: see handoff.tls of both")
    deadline = time.monotonic() + deadline_s
    try:
        sock = socket.create_connection((host, port), timeout=deadline_s)
    except OSError as error:
        raise FetchLost(f"cannot connect to {host}:{port}: {error}") from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        if tls is not None:
            sock = tls.wrap_socket(sock)
        exporter, reader = receive(sock, NONCE_BYTES, deadline), nonce()
        proof = Proof(token, exporter, reader)
        sock.sendall(reader + proof.of_reader)
        check(receive(sock, MAC_BYTES, deadline), proof.of_exporter, "its proof")
        (welcome,) = _WELCOME.unpack(receive(sock, _WELCOME.size, deadline))
        if welcome != exported:
            raise ConnectionRefusedError(f"it exports {welcome} bytes, not {exported}")
    except OSError as error:
        sock.close()
        raise FetchLost(f"{host}:{port} did not welcome this worker: {error}") from None
    return sock, proof, exported


def _parsed(address: bytes, transport: str) -> tuple[str, int, bytes, int, bool]:
    try:
        host, port, token, exported, encrypted = msgpack.unpackb(address, max_array_len=5, max_ext_len=0)
        valid = isinstance(host, str) and type(port) is type(exported) is int and isinstance(token, bytes)
    except (ValueError, TypeError, msgpack.UnpackException):
        valid = False
    if not valid or not 0 < port < 65536 or len(token) != _TOKEN_BYTES or type(encrypted) is not bool:
        raise FetchLost(f"not a {transport} address")
    return host, port, token, exported, encrypted


def receive(sock: socket.socket, nbytes: int, deadline: float | None) -> bytes:
    """Exactly ``nbytes``; raises OSError at the end of the stream."""
    data = bytearray(nbytes)
    receive_into(sock, memoryview(data), deadline)
    return bytes(data)


def receive_into(sock: socket.socket, view: memoryview, deadline: float | None) -> None:
    """Fills ``view`` by ``deadline``, or within the socket's own timeout for each part of it; raises OSError."""
    while len(view) > 0:
        if deadline is not None:
            sock.settimeout(max(1e-3, deadline - time.monotonic()))
        received = sock.recv_into(view)
        if received == 0:
            raise ConnectionResetError("connection closed")
        view = view[received:]
        if deadline is not None and len(view) > 0 and time.monotonic() >= deadline:
            raise TimeoutError("timed out")


def cut(sock: socket.socket) -> None:
    """Ends a connection that another thread may be reading; it still has to be closed.

    An SSLSocket's own ``shutdown`` forgets its TLS state, after which that thread would read ciphertext as data.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
