"""Keyed digests of blocks, for members of a cluster: who lacks the key cannot make bytes that fit one (ADR 10).

A universal hash whose value nobody sees and a pseudorandom function over it: ``blake2b(k2, GHASH(k1, bytes) + place)``.
GHASH is what AES-GCM authenticates with. Its nonce is fixed here, which is safe because its value never leaves this
module; so unlike with a plain GMAC there is no counter that a restart could repeat.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from baton.secure import ClusterKey

_NONCE = bytes(12)


class BlockKey:
    def __init__(self, key: ClusterKey) -> None:
        self._hash = AESGCM(key.derive("kv block hash", 32))
        self._tag_key = key.derive("kv block tag", 32)

    def digest(self, place: bytes, encoded: memoryview, nbytes: int) -> bytes:
        """``nbytes`` that bind ``encoded`` to ``place``."""
        hidden = self._hash.encrypt(_NONCE, b"", encoded)
        return hashlib.blake2b(hidden + place, key=self._tag_key, digest_size=nbytes).digest()
