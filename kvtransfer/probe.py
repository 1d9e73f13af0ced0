"""A worker's answers to ``baton doctor``: what its machine is like, and handoffs of a known pattern in both directions.

A probe is a real handoff of a request that does not exist: one lease, a few blocks, no pages and no engine. On the side
that the worker serves it passes through the worker's own sender or receiver; on the other one through a small one that
lives as long as the probe. It is refused while requests wait, and there is one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import torch
from torch import Tensor

from baton import host
from baton.config_handoff import AUTO, CODECS, HandoffConfig
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.frames import FrameStream
from baton.guard import Guard
from baton.layout import KVLayout
from baton.messages import Granted, Inspect, Inspected, Load, Probe, ProbeLanded, ProbeSent, Ticket
from baton.plane import answer, failure
from baton.request import TokenEvent
from baton.secure import ClusterKey
from kvtransfer.handoff import Expired, Landed, Lost
from kvtransfer.outgoing import Outgoing
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender

MAX_PROBE_BYTES = 64 << 20  # of KV before encoding; MIN_TOKENS are handed over in any case
MAX_BUDGET_S = 30.0
LATENCY_ROUNDS = 4  # tokens handed over one by one, after the first, which pays for connecting
MIN_TOKENS = LATENCY_ROUNDS + 2
BUFFER_BYTES = 16 << 20  # of the sender or receiver that a worker of the other role borrows
_LAYER_STRIDE = 17
_TCP_INFO_BYTES, _TCP_BYTES_RECEIVED = 256, 128  # struct tcp_info of linux/tcp.h, tcpi_bytes_received


def refusal(load: Load) -> str:
    """Why a worker that holds ``load`` should not be probed now; empty when it may be."""
    if load.waiting:
        return f"{load.waiting} requests wait here"
    held = load.buffer_bytes_used + load.buffer_bytes_quarantined
    if 2 * held > load.buffer_bytes_total:
        return f"{held} of {load.buffer_bytes_total} buffer bytes are held"
    return ""


class Probes:
    """The probes of one worker, on its event loop. Whoever calls :meth:`serve` owns, and may cancel, the task."""

    def __init__(
        self, layout: KVLayout, config: HandoffConfig, *, worker_id: str, host: str,
        load: Callable[[], Load], own: Sender | Receiver, key: ClusterKey | None = None,
    ) -> None:  # fmt: skip
        self._layout, self._name, self._host, self._load = layout, f"{worker_id}-probe", host, load
        self._config, self._own, self._key = config, own, key
        self._under_way = False

    async def serve(self, link: FrameStream, record: Inspect | Probe) -> None:
        """Answers ``record``; holds nothing when it returns, however that comes about."""
        try:
            if isinstance(record, Inspect):
                answer(link, Inspected(record.request_id, await asyncio.to_thread(host.gather)))
            else:
                answer(link, await self._probe(link, record))
        except TimeoutError:
            answer(link, failure(record.request_id, DeadlineExceeded("the probe's time is used up")))
        except BatonError as error:
            answer(link, failure(record.request_id, error))

    async def _probe(self, link: FrameStream, probe: Probe) -> ProbeSent | ProbeLanded:
        self._check(probe)
        self._under_way = True
        try:
            async with asyncio.timeout(probe.budget_s):
                if probe.ticket is None:
                    return await self._land(link, probe)
                return await self._send(probe, probe.ticket)
        finally:
            self._under_way = False

    def _check(self, probe: Probe) -> None:
        """Raises :class:`InvalidRequest` or :class:`Overloaded`."""
        if not 0 < probe.kv_bytes <= MAX_PROBE_BYTES:
            raise InvalidRequest("kv_bytes", f"is {probe.kv_bytes}, allowed: 1 to {MAX_PROBE_BYTES}")
        if probe.codec not in (AUTO, *CODECS):
            raise InvalidRequest("codec", f"is {probe.codec!r}, allowed: {AUTO}, {', '.join(CODECS)}")
        if not 0.0 < probe.budget_s <= MAX_BUDGET_S:
            raise InvalidRequest("budget_s", f"is {probe.budget_s}, allowed: above 0, at most {MAX_BUDGET_S:g}")
        reason = "another probe is under way" if self._under_way else refusal(self._load())
        if reason:
            raise Overloaded(reason, retry_after_ms=500)

    async def _land(self, link: FrameStream, probe: Probe) -> ProbeLanded:
        tokens = self._tokens(probe)
        pattern = Pattern(self._layout, tokens)
        async with self._receiving() as receiver:
            tcp_before = await asyncio.to_thread(tcp_received)
            try:
                ticket = receiver.reserve(
                    probe.request_id, 1, tokens=tokens, codec=probe.codec,
                    floor=self._config.quality_floor, budget_s=probe.budget_s, write=pattern.compare,
                )  # fmt: skip
            except ValueError as error:
                raise InvalidRequest("request_id", str(error)) from None
            try:
                answer(link, Granted(ticket))
                landed = _landed(await receiver.outcome(probe.request_id))
                carrier = receiver.carrier(probe.request_id)
                tcp_bytes = await asyncio.to_thread(tcp_received) - tcp_before
            finally:
                await asyncio.shield(receiver.release(probe.request_id))
            return ProbeLanded(
                probe.request_id, pattern.exact, landed.bytes, max(0, tcp_bytes), self._config.transport, carrier
            )

    async def _send(self, probe: Probe, ticket: Ticket) -> ProbeSent:
        tokens = self._tokens(probe)
        pattern = Pattern(self._layout, tokens)
        async with self._sending() as sender:
            outgoing = sender.open(ticket, tokens=tokens, budget_s=probe.budget_s, gather=pattern.gather)
            try:
                setup_s = await self._round(outgoing, 0, 1)
                rounds = [await self._round(outgoing, start, 1) for start in range(1, 1 + LATENCY_ROUNDS)]
                start = 1 + LATENCY_ROUNDS
                seconds = await self._round(outgoing, start, tokens - start)
                outgoing.finish(TokenEvent(probe.request_id, 0, 0))
                _landed(await outgoing.outcome())
                way = sender.link_to(ticket)
            finally:
                outgoing.abort("the probe was given up")  # changes nothing once it has landed
        kv_bytes = (tokens - start) * self._layout.token_bytes
        return ProbeSent(probe.request_id, setup_s, min(rounds), seconds, kv_bytes, way.bytes_per_s, way.latency_s)

    def _tokens(self, probe: Probe) -> int:
        wide = replace(self._layout, dtype="float32")  # both ends must count alike, whatever their own dtypes
        return max(MIN_TOKENS, probe.kv_bytes // wide.token_bytes)

    async def _round(self, outgoing: Outgoing, start: int, count: int) -> float:
        """Seconds until ``count`` tokens of all layers have landed."""
        started = time.monotonic()
        for layer in range(self._layout.layers):
            outgoing.push(layer, start, count)
        await outgoing.caught_up()
        return time.monotonic() - started

    @contextlib.asynccontextmanager
    async def _receiving(self) -> AsyncIterator[Receiver]:
        """The worker's own receiver, or a small one for the length of one probe."""
        if isinstance(self._own, Receiver):
            yield self._own
            return
        borrowed = Receiver(
            self._layout, self._small(), host=self._host, guard=Guard(self._key),
            worker_id=self._name, generation=secrets.token_hex(8),
        )  # fmt: skip
        await borrowed.start()
        try:
            yield borrowed
        finally:
            await asyncio.shield(borrowed.close())

    @contextlib.asynccontextmanager
    async def _sending(self) -> AsyncIterator[Sender]:
        """The worker's own sender, or a small one for the length of one probe."""
        if isinstance(self._own, Sender):
            yield self._own
            return
        borrowed = Sender(
            self._layout, self._small(), host=self._host, key=self._key,
            worker_id=self._name, generation=secrets.token_hex(8),
        )  # fmt: skip
        await borrowed.start()
        try:
            yield borrowed
        finally:
            await asyncio.shield(borrowed.close())

    def _small(self) -> HandoffConfig:
        """Fewer buffers, and no lossy codec: every codec that may be chosen is measured at the start."""
        config = self._config
        return config.model_copy(
            update={
                "landing_bytes": min(config.landing_bytes, BUFFER_BYTES),
                "staging_bytes": min(config.staging_bytes, BUFFER_BYTES),
                "quality_floor": "exact",
            }
        )


def _landed(outcome: Landed | Lost | Expired) -> Landed:
    match outcome:
        case Landed():
            return outcome
        case Lost(reason):
            raise Unavailable(f"the handoff was lost: {reason}")
        case Expired(reason):
            raise DeadlineExceeded(f"the handoff expired: {reason}")


class Pattern:
    """KV that both ends know: small integers, exact in every dtype, that differ between neighbours in every direction.

    Every layer is a window of one table, so that neither end computes or copies anything while the clock runs.
    """

    def __init__(self, layout: KVLayout, tokens: int) -> None:
        rows, width = tokens + _LAYER_STRIDE * layout.layers, layout.kv_heads * layout.head_dim
        table = (31 * torch.arange(rows)[:, None] + 7 * torch.arange(width)[None, :]) % 251 - 125
        dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
        self._keys = table.to(dtype).view(rows, layout.kv_heads, layout.head_dim)
        self._values = self._keys.neg()
        self.exact = True

    def gather(self, layer: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, kv_heads, head_dim]."""
        rows = slice(_LAYER_STRIDE * layer + start, _LAYER_STRIDE * layer + start + count)
        return self._keys[rows], self._values[rows]

    def compare(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Takes what landed, in place of a cache's pages."""
        wanted_keys, wanted_values = self.gather(layer, start, keys.shape[0])
        self.exact &= torch.equal(keys, wanted_keys) and torch.equal(values, wanted_values)


def tcp_received() -> int:
    """Bytes that this process's open TCP connections have received, as the kernel counts; closed ones are not in it."""
    return sum(_received(int(name)) for name in os.listdir("/proc/self/fd"))


def _received(fd: int) -> int:
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return 0
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            if duplicate.family not in (socket.AF_INET, socket.AF_INET6) or duplicate.type != socket.SOCK_STREAM:
                return 0
            info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:  # closed meanwhile
        return 0
    if len(info) < _TCP_BYTES_RECEIVED + 8:
        return 0
    return int(struct.unpack_from("<Q", info, _TCP_BYTES_RECEIVED)[0])
