"""grpc.health.v1: whether a request could be served now, asked once or watched.

Health answers without a key, so what it may hold is bounded. A watch lasts for as long as its client likes and takes
one of the places that Serve has for this router's calls: there are few of them, and a router that must go ends them,
since Serve waits for every call before it lets a replica go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from grpc_health.v1 import health_pb2

from baton.errors import NotFound, Overloaded, Unavailable
from router import status

SERVICE_NAME = "baton.v1.Inference"
MOST_WATCHES = 64  # balancers watch once each
POLL_S = 0.25
RETRY_AFTER_MS = 1000

_Kinds = health_pb2.HealthCheckResponse


class Health:
    """Of one router. ``ready``: whether a request could be served now."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._watches = 0
        self._was_listed, self._leaving = False, False

    def listed(self, is_listed: bool) -> None:
        """Whether Serve lists this router among those that run. When it no longer does, the router must go."""
        self._leaving = self._was_listed and not is_listed
        self._was_listed |= is_listed

    def check(self, service: str, context: status.Context) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that is not here."""
        if service not in ("", SERVICE_NAME):
            status.set_on(context, NotFound("service", f"unknown service {service!r}; known: {SERVICE_NAME}"))
        return self._state()

    async def watch(self, service: str, context: status.Context) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        """The state at once, then every change, until the client leaves or the router must; errors on ``context``."""
        if service not in ("", SERVICE_NAME):
            yield _Kinds(status=_Kinds.SERVICE_UNKNOWN)
            return
        if self._watches >= MOST_WATCHES:
            message = f"{self._watches} watch this router's health already"
            status.set_on(context, Overloaded(message, retry_after_ms=RETRY_AFTER_MS, reason="watches"))
            return
        self._watches += 1
        try:
            told: health_pb2.HealthCheckResponse | None = None
            while not self._leaving:
                current = self._state()
                if current != told:
                    yield current
                    told = current
                await asyncio.sleep(POLL_S)
        finally:
            self._watches -= 1
        status.set_on(context, Unavailable("this router leaves; another one answers the next call"))

    def _state(self) -> health_pb2.HealthCheckResponse:
        return _Kinds(status=_Kinds.SERVING if self._ready() else _Kinds.NOT_SERVING)
