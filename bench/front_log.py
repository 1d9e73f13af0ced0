"""How long each request took as the front saw it: from HAProxy's log, which it sends here line by line.

HAProxy is one small process that waits for nobody: its times hold what routers make clients wait, and nothing of what
the client's own process, which may be busy, adds to that.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

TARGET = "RAY_SERVE_HAPROXY_LOG_TARGET"  # Serve's environment variable for HAProxy's log target
BUFFER_BYTES = 4 << 20
# client [date] frontend backend/server TR/Tw/Tc/Tr/Ta status ... "request"; a time that never came is -1
LINE = re.compile(
    r"\] grpc_frontend \S+ -?\d+/-?\d+/-?\d+/(?P<first>-?\d+)/\+?(?P<all>\d+) "
    r'.*"\S+ \S*/baton\.v1\.Inference/Generate'
)
AT_ONCE_MS = 20  # from the first byte to the last of an answer that is an error: nobody streams tokens so fast


@dataclass(frozen=True, slots=True)
class Served:
    """One call of Generate. Times in ms."""

    first_ms: int  # from passing it on to the first byte of the answer; -1: none came
    all_ms: int  # from its first byte to the last of the answer

    @property
    def refused(self) -> bool:
        """It was answered with an error, however late."""
        return self.first_ms >= 0 and self.all_ms - self.first_ms < AT_ONCE_MS


class FrontLog:
    """Listens for HAProxy's log; clusters that are started with ``environment`` send it here. Use with ``with``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)

    @property
    def environment(self) -> dict[str, str]:
        return {TARGET: f"127.0.0.1:{self._socket.getsockname()[1]}"}

    async def calls(self, settle_s: float = 0.5) -> list[Served]:
        """Those that ended since this was last asked for, in that order."""
        await asyncio.sleep(settle_s)
        lines = []
        while True:
            try:
                lines.append(self._socket.recv(65536).decode(errors="replace"))
            except BlockingIOError:
                return parsed(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()


def parsed(lines: Sequence[str]) -> list[Served]:
    """The calls of Generate among ``lines``."""
    found = (LINE.search(line) for line in lines)
    return [Served(int(one["first"]), int(one["all"])) for one in found if one]
