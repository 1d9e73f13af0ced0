"""Both ends in one process: a fetch is a copy. For tests, and for a worker that hands over to itself."""

from __future__ import annotations

import secrets
import threading

from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, check_range

_exports: dict[bytes, HostMemory] = {}
_lock = threading.Lock()


class LoopbackExporter:
    def __init__(self, memory: HostMemory) -> None:
        self._token = secrets.token_bytes(16)
        with _lock:
            _exports[self._token] = memory

    def address(self) -> bytes:
        return self._token

    def sending(self) -> None:
        return None

    def close(self) -> None:
        with _lock:
            _exports.pop(self._token, None)


class LoopbackFetcher:
    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory

    def connect(self, address: bytes, deadline_s: float) -> LoopbackSource:
        source = LoopbackSource(self._memory, address)
        source.exported()
        return source

    def close(self) -> None:
        pass


class LoopbackSource:
    def __init__(self, landing: HostMemory, token: bytes) -> None:
        self._landing, self._token = landing, token
        self._interrupted = False

    def exported(self) -> HostMemory:
        with _lock:
            memory = _exports.get(self._token)
        if memory is None or self._interrupted:
            raise FetchLost("the exporter is closed")
        return memory

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> float:
        memory = self.exported()
        check_range(offset, nbytes, memory.nbytes)
        self._landing.view(at, nbytes)[:] = memory.view(offset, nbytes)
        return 0.0

    def carrier(self) -> str:
        return "a copy within one process"

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self._interrupted = True
