"""How a reader of exported memory shows that it was given the address, without saying its token where others listen.

    exporter  16 random bytes
    reader    16 random bytes, and a proof: a MAC of both under the token
    exporter  its own proof
    reader    every request with a MAC under a key of this connection, requests being numbered

The token is part of the address, which crosses the control connection only. So nobody who overhears a data connection
can open another one, and nobody who takes one over can ask it for other bytes (ADR 10).
"""

from __future__ import annotations

import hmac
import secrets
import struct
from hashlib import blake2b

NONCE_BYTES = 16
MAC_BYTES = 16
_NUMBER = struct.Struct("<Q")


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


class Proof:
    """What both ends of one connection derive from the token and from their two nonces."""

    def __init__(self, token: bytes, exporter: bytes, reader: bytes) -> None:
        self.of_reader = _mac(token, b"reader", exporter + reader)
        self.of_exporter = _mac(token, b"exporter", exporter + reader)
        self._key = _mac(token, b"requests", exporter + reader)
        self._number = 0

    def signed(self, request: bytes) -> bytes:
        """The next request as it goes on the wire: ``MAC_BYTES`` longer."""
        return request + self._next(request)

    def checked(self, signed: bytes) -> bytes:
        """The request in ``signed``; raises OSError if it is not the next one of whoever holds the token."""
        request, mac = signed[:-MAC_BYTES], signed[-MAC_BYTES:]
        check(mac, self._next(request), "a request")
        return request

    def _next(self, request: bytes) -> bytes:
        number = _NUMBER.pack(self._number)
        self._number += 1
        return _mac(self._key, b"request", number + request)


def check(mac: bytes, expected: bytes, what: str) -> None:
    """Raises OSError if they differ."""
    if not hmac.compare_digest(mac, expected):
        raise ConnectionRefusedError(f"{what} was not made with the token")


def _mac(key: bytes, use: bytes, data: bytes) -> bytes:
    return blake2b(data, key=key, person=use, digest_size=MAC_BYTES).digest()
