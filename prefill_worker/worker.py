"""The prefill worker: a prompt in, its first token to the router, its KV to the decode worker named in the ticket.

The engine thread computes; after each layer of each chunk it calls :meth:`PrefillWorker.layer_written`, which only
queues: the sender's encoder thread gathers that layer's KV from the pages while the engine computes the next layer, or,
where they lie on a GPU, encodes it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

from torch import Tensor

from baton.config import Config
from baton.errors import BatonError, DeadlineExceeded, Internal, Unavailable
from baton.frames import FrameStream
from baton.guard import Guard
from baton.messages import HANDOFF_LOST, Cancel, Handed, Hello, Inspect, Load, Prefill, Probe, Report, Tokens
from baton.plane import PlaneServer, answer, broke, failure
from baton.request import TokenEvent, Work
from baton.secure import load_key
from baton.tasks import Jobs
from engine.build import build_engine
from engine.cache import KVCache, Locate
from engine.device_pages import device_pages
from engine.engine import BROKEN, Chunk, Engine
from engine.loop import EngineLoop
from engine.model import Model
from engine.ranks import Ranks
from kvtransfer.handoff import Expired, Landed, Lost
from kvtransfer.outgoing import Outgoing
from kvtransfer.pages import Accelerator, Rows
from kvtransfer.probe import Probes
from kvtransfer.sender import Sender

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """One prompt under way. ``pages`` grows as chunks are computed; the encoder thread reads the latest."""

    outgoing: Outgoing
    first: asyncio.Future[tuple[Report, TokenEvent]]
    pages: tuple[int, ...] = field(default=())
    locate: Locate | None = None  # in ``pages``; None where several ranks hold the heads
    written: dict[int, Callable[[], None]] = field(default_factory=dict)  # by layer; on a GPU: waits for its KV


class PrefillWorker:
    """Serves Prefill and Cancel from routers. ``on_fatal`` is called when the process is no longer of use."""

    def __init__(self, model: Model, config: Config, *, worker_id: str, host: str, ranks: Ranks | None = None) -> None:
        self.generation = secrets.token_hex(8)
        self.worker_id = worker_id
        self.failure: BaseException | None = None
        self._engine = build_engine(model, config.prefill, config.model.max_context, observer=self, ranks=ranks)
        self.layout = self._engine.layout
        self._loop = EngineLoop(self._engine, self._computed, self._broke)
        identity = {"worker_id": worker_id, "generation": self.generation}
        guard = self._guard = Guard(load_key(config.security))
        device = self._on_device = device_pages(self._engine.cache)
        accelerator = None if device is None else Accelerator(device.kernels, device.device)
        self._sender = Sender(
            self.layout, config.handoff, host=host, key=guard.key, accelerator=accelerator, **identity
        )
        hello = Hello(role="prefill", layout=self.layout.family, dtype=self.layout.dtype, **identity)
        self._plane = PlaneServer(self, hello, host=host, guard=guard, journal=self._engine.blocks)
        self._jobs: dict[str, _Job] = {}
        self._tasks = Jobs(broke)
        self._probes = Probes(
            self.layout, config.handoff, worker_id=worker_id, host=host, load=self.load, own=self._sender, key=guard.key
        )

    @property
    def port(self) -> int:
        return self._plane.port

    async def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._loop.start()
        self._engine.watch(self._broke)
        await self._sender.start()
        await self._plane.start()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new and lets what is here end, for ``grace_s``; what is left then goes on elsewhere."""
        self._plane.drain()
        if not await self._tasks.idle(grace_s):
            log.warning("%d requests outlast the grace of %.0f s and go on elsewhere", len(self._tasks), grace_s)

    async def close(self) -> None:
        await self._plane.close()
        await self._tasks.close()
        await self._sender.close()
        await asyncio.to_thread(self._loop.stop, 10.0)
        await asyncio.to_thread(self._engine.close)

    # ---- the token plane

    def received(self, link: FrameStream, record: object) -> None:
        match record:
            case Prefill() if self._plane.draining:
                leaving = Unavailable(f"{self.worker_id} is draining", reason="worker_leaving")
                answer(link, failure(record.work.request_id, leaving))
            case Prefill():
                self._tasks.start(link, record.work.request_id, lambda: self._serve(link, record))
            case Cancel():
                self._tasks.cancel(link, record.request_id)
            case Inspect() | Probe():
                self._tasks.start(link, record.request_id, lambda: self._probes.serve(link, record))
            case _:
                log.warning("router %s sent %s to a prefill worker; ignored", link.peer, type(record).__name__)

    def gone(self, link: FrameStream) -> None:
        self._tasks.cancel_all(link)

    def load(self) -> Load:
        held, staging = self._engine.load(), self._sender.stats()
        return Load(
            waiting=held.waiting,
            waiting_tokens=held.waiting_tokens,
            running=held.running,
            pages_used=held.pages_used,
            pages_total=held.pages_total,
            pages_high_water=held.pages_high_water,
            pages_cached=held.pages_cached,
            prompt_token_s=held.prompt_token_s,
            step_s=held.step_s,
            sequence_s=held.sequence_s,
            handoffs=staging.handoffs,
            buffer_bytes_used=staging.staging_bytes_used,
            buffer_bytes_total=staging.staging_bytes_total,
            buffer_bytes_quarantined=0,
            connections_refused=self._guard.refused,
            prefix_lookup_tokens=held.entered_tokens,
            prefix_hit_tokens=held.hit_tokens,
            preemptions=self._engine.preemptions,
        )

    # ---- one request

    async def _serve(self, link: FrameStream, message: Prefill) -> None:
        """Compute, answer with the first token, hand the KV over; frees everything on every way out."""
        work = message.work
        try:
            async with asyncio.timeout(work.budget_s):
                await self._prefill(link, message)
        except TimeoutError:
            answer(link, failure(work.request_id, DeadlineExceeded("the deadline passed during prefill")))
        except BatonError as error:
            answer(link, failure(work.request_id, error))

    async def _prefill(self, link: FrameStream, message: Prefill) -> None:
        work = message.work
        job = self._open(message)
        try:
            await self._on_engine(lambda engine: engine.add(work, prefill_only=True))
            report, first = await job.first
            if first.finish == BROKEN:
                raise Internal(f"{self.worker_id} computed no finite logits")
            answer(link, report)
            answer(link, Tokens((first,)))
            if first.finish:
                job.outgoing.abort("the first token ended the request")
                return
            job.outgoing.finish(first)
            await job.outgoing.encoded()
            await self._release(work)
            match await job.outgoing.outcome():
                case Landed():
                    answer(link, Handed(work.request_id))
                case Lost(reason=reason):
                    raise Unavailable(f"the handoff was lost: {reason}", reason=HANDOFF_LOST)
                case Expired():
                    raise DeadlineExceeded("the handoff's lease expired", reason="handoff_expired")
                case never:
                    assert_never(never)
        finally:
            job.outgoing.abort("the prefill worker gave the request up")
            self._jobs.pop(work.request_id, None)  # before any wait: a second cancellation would end it
            await asyncio.shield(self._release(work))

    def _open(self, message: Prefill) -> _Job:
        request_id = message.work.request_id

        def gather(layer: int, start: int, count: int) -> tuple[Tensor, Tensor] | Rows:
            if job.locate is None:
                return self._engine.cache.gather(layer, job.pages, start, count)
            if self._on_device is not None:
                job.written[layer]()
            return Rows(*job.locate(layer, start, count))

        outgoing = self._sender.open(
            message.ticket, tokens=len(message.work.known), budget_s=message.work.budget_s, gather=gather
        )
        job = _Job(outgoing, first=asyncio.get_running_loop().create_future())
        self._jobs[request_id] = job
        return job

    async def _release(self, work: Work) -> None:
        with contextlib.suppress(Unavailable):  # a broken engine holds nothing that outlives the process
            await asyncio.wrap_future(self._loop.call(lambda engine: engine.release(work.request_id), bounded=False))

    def _on_engine(self, act: Callable[[Engine], T]) -> asyncio.Future[T]:
        """``act`` between two steps of the engine, awaitable here."""
        return asyncio.wrap_future(self._loop.call(act))

    # ---- called on the engine thread

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        written = None if self._on_device is None else self._on_device.mark()
        for chunk in chunks:
            job = self._jobs.get(chunk.request_id)
            if job is not None:
                if chunk.pages is not job.pages:
                    job.locate, job.pages = self._locator(chunk.pages), chunk.pages
                if written is not None:
                    job.written[layer] = written
                job.outgoing.push(layer, chunk.start, chunk.count)

    def _locator(self, pages: tuple[int, ...]) -> Locate | None:
        cache = self._engine.cache
        return cache.locator(pages) if isinstance(cache, KVCache) else None

    def _computed(self, events: list[TokenEvent]) -> None:
        self._events.call_soon_threadsafe(self._deliver, [(self._report(event), event) for event in events])

    def _report(self, event: TokenEvent) -> Report:
        timing = self._engine.timing(event.request_id)
        return Report(event.request_id, {"queue": timing.queue_s, "prefill": timing.prefill_s})

    def _broke(self, error: BaseException) -> None:
        self.failure = error
        self._events.call_soon_threadsafe(self._fail_all)

    # ---- back on the event loop

    def _fail_all(self) -> None:
        for job in self._jobs.values():
            if not job.first.done():
                job.first.set_exception(Unavailable(f"the engine of {self.worker_id} failed: {self.failure!r}"))

    def _deliver(self, first_tokens: list[tuple[Report, TokenEvent]]) -> None:
        for report, event in first_tokens:
            job = self._jobs.get(event.request_id)
            if job is not None and not job.first.done():
                job.first.set_result((report, event))
