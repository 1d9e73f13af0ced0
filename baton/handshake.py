"""The handshake of ``baton.secure`` over a stream: 45 bytes from the connecting end, 77 back, 32 more.

Nothing larger is read before the peer is trusted; the caller bounds the time.
"""

from __future__ import annotations

import asyncio

from baton.secure import HELLO_BYTES, PROOF_BYTES, ClusterKey, Handshake, Seal, Untrusted

Seals = tuple[Seal, Seal]  # for sending, for receiving


async def prove(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: ClusterKey, protocol: bytes) -> Seals:
    """The connecting end: proves ``key`` and demands the same; raises :class:`Untrusted`."""
    shake = Handshake(key, protocol, accepts=False)
    writer.write(shake.hello)
    shake.meet(await _read(reader, HELLO_BYTES))
    seals = shake.check(await _read(reader, PROOF_BYTES))
    writer.write(shake.proof)
    return seals


async def demand(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: ClusterKey, protocol: bytes) -> Seals:
    """The accepting end: demands a proof of ``key`` and gives one; raises :class:`Untrusted`."""
    shake = Handshake(key, protocol, accepts=True)
    shake.meet(await _read(reader, HELLO_BYTES))
    writer.write(shake.hello + shake.proof)
    return shake.check(await _read(reader, PROOF_BYTES))


async def _read(reader: asyncio.StreamReader, nbytes: int) -> bytes:
    try:
        return await reader.readexactly(nbytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Untrusted(
            "the peer closed the connection during the handshake; its cluster key or version may be another"
        ) from None
