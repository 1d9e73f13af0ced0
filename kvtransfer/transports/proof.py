"""How a reader of exported memory shows that it was given the address, without saying its token where others listen.

    exporter  16 random bytes
    reader    16 random bytes, and a proof: a MAC of both under the token
    exporter  its own proof
    reader    every request with a MAC under a key of this connection, requests being numbered

The token is part of the address, which crosses the control connection only. So nobody who overhears a data connection
can open another one, and nobody who takes one over can ask it for other bytes.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from hashlib import blake2b

NONCE_BYTES = 16
PROOF_BYTES = 16
MAC_BYTES = 16
_NUMBER = struct.Struct("<Q")


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def reader_proof(token: bytes, exporter: bytes, reader: bytes) -> bytes:
    """``exporter``, ``reader``: their nonces."""
    return _mac(token, b"reader", exporter + reader)


def exporter_proof(token: bytes, exporter: bytes, reader: bytes) -> bytes:
    return _mac(token, b"exporter", exporter + reader)


class Requests:
    """The requests of one connection, at either end."""

    def __init__(self, token: bytes, exporter: bytes, reader: bytes) -> None:
        self._key = _mac(token, b"requests", exporter + reader)
        self._number = 0

    def mac(self, request: bytes) -> bytes:
        """Of the next request."""
        number = _NUMBER.pack(self._number)
        self._number += 1
        return _mac(self._key, b"request", number + request)

    def genuine(self, request: bytes, mac: bytes) -> bool:
        """Whether ``request`` is the next one of whoever holds the token."""
        return hmac.compare_digest(self.mac(request), mac)


def _mac(key: bytes, use: bytes, data: bytes) -> bytes:
    return blake2b(data, key=key, person=use, digest_size=MAC_BYTES).digest()
