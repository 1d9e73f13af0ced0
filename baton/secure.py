"""What lets processes of one cluster trust each other: a shared key, a handshake proving it, sealed frames (ADR 10).

The cluster key proves membership, not identity: whoever holds it may act as any worker or router of the cluster.

    connecting end   hello: magic, version, role, fingerprint of the records spoken, ephemeral X25519 key
    accepting end    its own hello, and a proof
    connecting end   a proof; frames follow

Proofs and frame keys come from the ephemeral exchange under the cluster key, and both hellos are bound into them. So
nothing can be replayed into another connection, another direction or another protocol, and frames recorded today stay
closed to whoever learns the cluster key later.

No I/O here: ``baton.handshake`` moves the bytes.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import struct
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from baton.config_security import SecurityConfig
from baton.errors import ConfigError, ProtocolError
from baton.files import read_text
from baton.records import FINGERPRINT_BYTES

log = logging.getLogger(__name__)

KEY_VARIABLE = "BATON_CLUSTER_KEY"
MIN_KEY_CHARACTERS = 32
MAX_KEY_FILE_BYTES = 4096
TAG_BYTES = 16
PROOF_BYTES = 32
_MAGIC, _VERSION = b"BTN", 1
_CONNECTS, _ACCEPTS = 0, 1
_HELLO = struct.Struct(f"<3sBB{FINGERPRINT_BYTES}s32s")
HELLO_BYTES = _HELLO.size


class Untrusted(ProtocolError):
    """The peer did not prove that it holds the cluster key, or a frame is not what its sender sealed."""


class ClusterKey:
    """The secret that all processes of one cluster share. Never printed, never pickled, only derived from."""

    __slots__ = ("_secret",)

    def __init__(self, text: str, *, source: str = "security.cluster_key_file") -> None:
        """``text``: at least 32 random characters. Raises :class:`ConfigError`, which never shows them."""
        text = text.strip()
        if len(text) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"a cluster key has at least {MIN_KEY_CHARACTERS} characters, this one has {len(text)}", field=source
            )
        self._secret = text.encode()

    def derive(self, purpose: str, nbytes: int, *, mixed: bytes = b"", context: bytes = b"") -> bytes:
        """``nbytes`` for one purpose. ``mixed``: secret bytes mixed in; ``context``: public ones bound in."""
        info = f"baton {purpose}".encode() + b"\0" + context
        return HKDF(hashes.SHA256(), nbytes, salt=self._secret, info=info).derive(mixed)

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster key is not pickled: every process reads it from its own file or environment")


def load_key(security: SecurityConfig) -> ClusterKey | None:
    """The key in ``security.cluster_key_file``, else in $BATON_CLUSTER_KEY, else None. Raises :class:`ConfigError`."""
    if security.cluster_key_file:
        path = Path(security.cluster_key_file).expanduser()
        text = read_text(path, field="security.cluster_key_file", most_bytes=MAX_KEY_FILE_BYTES)
        if path.stat().st_mode & 0o007:
            log.warning("%s can be read by every user of this machine; mode 0600 keeps it to this one", path)
        return ClusterKey(text)
    found = os.environ.get(KEY_VARIABLE)
    return None if found is None else ClusterKey(found, source=f"${KEY_VARIABLE}")


def require_key(security: SecurityConfig) -> ClusterKey | None:
    """As :func:`load_key`, but None only where the configuration says that anybody may connect."""
    key = load_key(security)
    if key is None and not security.allow_unauthenticated:
        raise ConfigError(
            f"no cluster key: name a file that holds one on every node, set ${KEY_VARIABLE}, or allow anybody with "
            "security.allow_unauthenticated",
            field="security.cluster_key_file",
        )
    return key


def write_key(path: Path) -> None:
    """A fresh key in a new file that only this user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(48) + "\n")


class Seal:
    """One direction of one connection. Frames are numbered: a lost, repeated, reordered or foreign one does not open.

    AES-256-GCM under a key of this direction alone, the frame's number as nonce. On token-plane frames a plain MAC
    would cost the same (ADR 10), so everything is encrypted.
    """

    __slots__ = ("_cipher", "_number")

    def __init__(self, key: bytes) -> None:
        self._cipher, self._number = AESGCM(key), 0

    def close(self, body: bytes) -> bytes:
        """``body`` sealed: ``TAG_BYTES`` longer."""
        return self._cipher.encrypt(self._next(), body, None)

    def open(self, sealed: bytes) -> bytes:
        """The body; raises :class:`Untrusted`."""
        try:
            return self._cipher.decrypt(self._next(), sealed, None)
        except InvalidTag:
            raise Untrusted(f"frame {self._number - 1} is not the one that was sent") from None

    def _next(self) -> bytes:
        number = self._number.to_bytes(12, "little")
        self._number += 1
        return number


class Handshake:
    """One end of a handshake; which methods to call when stands in ``baton.handshake``."""

    def __init__(self, key: ClusterKey, protocol: bytes, *, accepts: bool) -> None:
        """``protocol``: the fingerprint of the records that will be spoken; both ends must have the same."""
        self._key, self._protocol, self._accepts = key, protocol, accepts
        self._private = X25519PrivateKey.generate()
        role = _ACCEPTS if accepts else _CONNECTS
        self.hello = _HELLO.pack(_MAGIC, _VERSION, role, protocol, self._private.public_key().public_bytes_raw())

    def meet(self, hello: bytes) -> None:
        """Takes the other end's hello; raises :class:`Untrusted` unless it has one that fits."""
        magic, version, role, protocol, public = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise Untrusted("the peer speaks no handshake; it has no cluster key, or is not Baton")
        if version != _VERSION:
            raise Untrusted(f"the peer's handshake is version {version}, ours is {_VERSION}")
        if role != (_CONNECTS if self._accepts else _ACCEPTS):
            raise Untrusted("the peer takes our own side of the handshake")
        if protocol != self._protocol:
            raise Untrusted("the peer speaks other records; it runs another version, or this is another port")
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise Untrusted("the peer's ephemeral key is degenerate") from None
        both = hello + self.hello if self._accepts else self.hello + hello  # the connecting end's first
        keys = self._key.derive("frames", 4 * 32, mixed=shared, context=both)
        connecting, accepting = (keys[:32], keys[64:96]), (keys[32:64], keys[96:])
        (self.proof, sending), (self._expected, receiving) = (
            (accepting, connecting) if self._accepts else (connecting, accepting)
        )
        self._sending, self._receiving = sending, receiving

    def check(self, proof: bytes) -> tuple[Seal, Seal]:
        """The seals for sending and receiving, if ``proof`` is the other end's; else raises :class:`Untrusted`."""
        if not hmac.compare_digest(proof, self._expected):
            raise Untrusted("the peer holds another cluster key")
        return Seal(self._sending), Seal(self._receiving)
