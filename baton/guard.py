"""Who gets into this process: every accepted connection proves the cluster key here before its first record is read."""

from __future__ import annotations

import asyncio
import logging
import time

from baton.frames import FrameStream
from baton.handshake import demand
from baton.records import Registry
from baton.secure import ClusterKey, Untrusted

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_PENDING = 64  # connections in a handshake, which takes a member of the cluster a millisecond
LOG_S = 1.0  # refusals are logged at most this often


class Guard:
    """One per process. Without a key every connection gets in, which only an operator's explicit wish allows."""

    def __init__(self, key: ClusterKey | None = None) -> None:
        self.key = key
        self.refused = 0  # connections that did not prove the key
        self._pending: dict[asyncio.StreamWriter, None] = {}  # oldest first
        self._logged_at, self._unlogged = -LOG_S, 0

    async def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, registry: Registry
    ) -> FrameStream | None:
        """The connection as a stream of ``registry``'s records; None, and the connection cut, for a stranger."""
        if self.key is None:
            return FrameStream(reader, writer, registry)
        if len(self._pending) >= MAX_PENDING:  # strangers that dawdle give way; a member is done long before it is next
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.transport.abort()
        self._pending[writer] = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                seals = await demand(reader, writer, self.key, registry.fingerprint)
        except TimeoutError:
            self._refuse(writer, f"the peer did not prove a cluster key within {HANDSHAKE_S:g} s")
        except Untrusted as error:
            self._refuse(writer, str(error))
        else:
            return FrameStream(reader, writer, registry, seals)
        finally:
            self._pending.pop(writer, None)
        return None

    def close(self) -> None:
        """Cuts the connections whose handshake is under way."""
        for writer in list(self._pending):
            writer.transport.abort()

    def _refuse(self, writer: asyncio.StreamWriter, reason: str) -> None:
        name = writer.get_extra_info("peername")
        writer.transport.abort()
        self.refused += 1
        now = time.monotonic()
        if now - self._logged_at < LOG_S:
            self._unlogged += 1
            return
        more = f"; {self._unlogged} more since the last such line" if self._unlogged else ""
        log.warning("%s refused: %s%s", f"{name[0]}:{name[1]}" if name else "a peer", reason, more)
        self._logged_at, self._unlogged = now, 0
