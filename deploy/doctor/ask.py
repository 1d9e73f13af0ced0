"""The edge of the pair checks: talks to workers on the token plane, as a router does, and has them probe each other."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from baton.errors import BatonError, ProtocolError, Unavailable, from_code
from baton.frames import FrameStream
from baton.messages import PLANE, Cancel, Failed, Granted, Hello, Inspect, Inspected, Probe, ProbeLanded, ProbeSent
from baton.secure import ClusterKey
from deploy.doctor.facts import Direction, Pair, Worker

CONNECT_S = 5.0
ANSWER_S = 5.0
PROBE_S = 20.0
BUSY_TRIES, BUSY_PAUSE_S = 5, 0.5
PROBE_BYTES = 32 << 20  # of KV: long enough to measure, a hundredth of a second to a second on any network worth having
SMALL_BYTES = 1 << 20  # that the configured codec lands too needs no more


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker should be."""

    name: str
    role: str
    host: str
    port: int
    generation: str = ""  # as the router knows it; empty: whoever answers


class Line:
    """One connection to one worker. Questions are asked one at a time."""

    def __init__(self, link: FrameStream, hello: Hello) -> None:
        self._link, self.hello = link, hello

    @classmethod
    async def open(cls, place: Place, key: ClusterKey | None) -> Line:
        """Raises :class:`Unavailable` when nobody or somebody else answers there."""
        link = await FrameStream.connect(place.host, place.port, PLANE, timeout_s=CONNECT_S, key=key)
        try:
            async with asyncio.timeout(ANSWER_S):
                hello = await link.receive()
        except (TimeoutError, ProtocolError) as error:
            link.abort()
            raise Unavailable(f"connected, but it did not say hello: {error or 'timed out'}") from None
        if not isinstance(hello, Hello):
            link.abort()
            raise Unavailable("it closed the connection; it may demand another cluster key")
        if place.generation and hello.generation != place.generation:
            link.abort()
            raise Unavailable(f"process {hello.generation} answers, not {place.generation}, which the router knows")
        return cls(link, hello)

    async def ask(self, record: Inspect | Probe, *, timeout_s: float) -> Any:
        """The worker's answer. Raises its own error, or :class:`Unavailable` when it gave none in time."""
        self._link.send(record)
        return await self.answer(record.request_id, timeout_s=timeout_s)

    async def answer(self, request_id: str, *, timeout_s: float) -> Any:
        """The next record about ``request_id``; loads, and what is still said of given up probes, are passed over."""
        try:
            async with asyncio.timeout(timeout_s):
                while (record := await self._link.receive()) is not None and _about(record) != request_id:
                    pass
        except TimeoutError:
            raise Unavailable(f"no answer within {timeout_s:g} s") from None
        if record is None:
            raise Unavailable("it closed the connection")
        if isinstance(record, Failed):
            raise from_code(record.code, record.message, field=record.field, retry_after_ms=record.retry_after_ms)
        return record

    def cancel(self, request_id: str) -> None:
        self._link.send(Cancel(request_id))

    def close(self) -> None:
        self._link.abort()


async def workers(places: Sequence[Place], key: ClusterKey | None) -> list[Worker]:
    """Every worker's machine, clock and distance, asked at once."""
    return list(await asyncio.gather(*(_worker(place, key) for place in places)))


async def _worker(place: Place, key: ClusterKey | None) -> Worker:
    found = Worker(place.name, place.role, f"{place.host}:{place.port}")
    try:
        line = await Line.open(place, key)
    except BatonError as error:
        return replace(found, error=error.message)
    try:
        # The first answer also pays for whatever the worker imports or opens for it.
        await line.ask(Inspect(_name()), timeout_s=ANSWER_S)
        asked, wall_s = time.monotonic(), time.time()
        inspected = await line.ask(Inspect(_name()), timeout_s=ANSWER_S)
        rtt_s = time.monotonic() - asked
        if not isinstance(inspected, Inspected):
            return replace(found, error=f"it answered with {type(inspected).__name__}")
        ahead_s = inspected.host.clock_s - (wall_s + rtt_s / 2)
        return replace(found, hello=line.hello, host=inspected.host, rtt_s=rtt_s, ahead_s=ahead_s)
    except BatonError as error:
        return replace(found, error=error.message)
    finally:
        line.close()


async def pair(
    prefill: tuple[Place, Worker], decode: tuple[Place, Worker], *, codec: str, key: ClusterKey | None
) -> Pair:
    """Probes both directions, if both workers answered and their layouts agree."""
    found = Pair(prefill[1], decode[1], (), None)
    one, other = prefill[1].hello, decode[1].hello
    if one is None or other is None or one.layout != other.layout:
        return found
    async with AsyncExitStack() as stack:
        try:
            sender, lander = await Line.open(prefill[0], key), await Line.open(decode[0], key)
        except BatonError as error:
            return replace(found, forward=(Direction("raw", error=error.message),))
        stack.callback(sender.close)
        stack.callback(lander.close)
        forward = [await _probe(sender, lander, PROBE_BYTES, "raw")]
        if codec != "raw" and not forward[0].error:
            forward.append(await _probe(sender, lander, SMALL_BYTES, codec))
        back = None if forward[0].error else await _probe(lander, sender, PROBE_BYTES, "raw")
        return replace(found, forward=tuple(forward), back=back)


async def _probe(sender: Line, lander: Line, kv_bytes: int, codec: str) -> Direction:
    """One probe, again a few times while a worker is busy."""
    for _ in range(BUSY_TRIES):
        found = await _once(sender, lander, kv_bytes, codec)
        if not found.busy:
            break
        await asyncio.sleep(BUSY_PAUSE_S)
    return found


async def _once(sender: Line, lander: Line, kv_bytes: int, codec: str) -> Direction:
    probe = Probe(_name(), kv_bytes, codec, PROBE_S, None)
    try:
        granted = await lander.ask(probe, timeout_s=PROBE_S + ANSWER_S)
        if not isinstance(granted, Granted):
            raise Unavailable(f"{type(granted).__name__} in place of a ticket")
        try:
            sent = await _sent(sender, replace(probe, ticket=granted.ticket))
        except BatonError:
            lander.cancel(probe.request_id)
            raise
        landed = await lander.answer(probe.request_id, timeout_s=PROBE_S + ANSWER_S)
    except BatonError as error:
        return Direction(codec, error=str(error), busy=error.code == "RESOURCE_EXHAUSTED")
    if not isinstance(landed, ProbeLanded):
        return Direction(codec, error=f"{type(landed).__name__} from the landing side")
    return Direction(codec, sent, landed)


async def _sent(sender: Line, probe: Probe) -> ProbeSent:
    sent = await sender.ask(probe, timeout_s=PROBE_S + ANSWER_S)
    if not isinstance(sent, ProbeSent):
        raise Unavailable(f"{type(sent).__name__} from the sending side")
    return sent


def _name() -> str:
    return f"doctor-{secrets.token_hex(8)}"


def _about(record: object) -> str:
    return record.ticket.request_id if isinstance(record, Granted) else getattr(record, "request_id", "")
