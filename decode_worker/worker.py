"""The decode worker: grants leases, lands KV in its own pages, decodes in one continuous batch, streams to routers.

A request reaches it in one of two ways: ``Reserve`` (pages are taken, a ticket is granted, a prefill worker hands the
KV over) or ``Decode`` (the whole sequence is computed here, chunked prefill included). From the first decode step on
both are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, assert_never

from baton.config import Config
from baton.config_handoff import EXACT_CODECS
from baton.errors import BatonError, DeadlineExceeded, Internal, Unavailable
from baton.frames import FrameStream
from baton.guard import Guard
from baton.messages import HANDOFF_LOST, Cancel, Decode, Granted, Hello, Inspect, Load, Probe, Report, Reserve, Tokens
from baton.plane import PlaneServer, answer, broke, failure
from baton.request import TokenEvent, Work
from baton.secure import load_key
from baton.tasks import Jobs
from decode_worker.admission import Admission
from engine.build import build_engine
from engine.cache import KVCache
from engine.device_pages import device_pages
from engine.engine import BROKEN, Engine
from engine.loop import EngineLoop
from engine.model import Model
from engine.ranks import Ranks
from kvtransfer.handoff import Expired, Landed, Lost
from kvtransfer.landing import Write
from kvtransfer.pages import Accelerator, Paged, Rows
from kvtransfer.probe import Probes
from kvtransfer.receiver import Receiver

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """One sequence under way: where its tokens go, and what its ledger needs at the first of them."""

    link: FrameStream
    finished: asyncio.Future[None]
    landed: Landed | None = None
    landed_s: float = 0.0  # monotonic
    carrier: str = ""
    reported: bool = False


class DecodeWorker:
    """Serves Reserve, Decode and Cancel from routers."""

    def __init__(self, model: Model, config: Config, *, worker_id: str, host: str, ranks: Ranks | None = None) -> None:
        self.generation = secrets.token_hex(8)
        self.worker_id = worker_id
        self.failure: BaseException | None = None
        self._engine = build_engine(model, config.decode, config.model.max_context, ranks=ranks)
        self.layout = self._engine.layout
        self._loop = EngineLoop(self._engine, self._computed, self._broke)
        identity = {"worker_id": worker_id, "generation": self.generation}
        guard = self._guard = Guard(load_key(config.security))
        device = self._on_device = device_pages(self._engine.cache)
        accelerator = None if device is None else Accelerator(device.kernels, device.device)
        self._receiver = Receiver(
            self.layout, config.handoff, host=host, guard=guard, accelerator=accelerator, **identity
        )
        hello = Hello(role="decode", layout=self.layout.family, dtype=self.layout.dtype, **identity)
        self._plane = PlaneServer(self, hello, host=host, guard=guard, journal=self._engine.blocks)
        self._jobs: dict[str, _Job] = {}
        self._tasks = Jobs(broke)
        self._probes = Probes(
            self.layout,
            config.handoff,
            worker_id=worker_id,
            host=host,
            load=self.load,
            own=self._receiver,
            key=guard.key,
        )
        self._admission = Admission(config.decode.max_waiting, aging_s=config.admission.aging_s)

    @property
    def port(self) -> int:
        return self._plane.port

    async def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._loop.start()
        self._engine.watch(self._broke)
        await self._receiver.start()
        await self._plane.start()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new and lets what is here end, for ``grace_s``; what is left then goes on elsewhere."""
        self._plane.drain()
        if not await self._tasks.idle(grace_s):
            log.warning("%d requests outlast the grace of %.0f s and go on elsewhere", len(self._tasks), grace_s)

    async def close(self) -> None:
        await self._plane.close()
        await self._tasks.close()
        await self._receiver.close()
        await asyncio.to_thread(self._loop.stop, 10.0)
        await asyncio.to_thread(self._engine.close)

    # ---- the token plane

    def received(self, link: FrameStream, record: object) -> None:
        match record:
            case Reserve() | Decode() if self._plane.draining:
                leaving = Unavailable(f"{self.worker_id} is draining", reason="worker_leaving")
                answer(link, failure(record.work.request_id, leaving))
            case Reserve():
                self._tasks.start(link, record.work.request_id, lambda: self._serve(link, record))
            case Decode():
                self._tasks.start(link, record.work.request_id, lambda: self._serve(link, record))
            case Cancel():
                self._tasks.cancel(link, record.request_id)
            case Inspect() | Probe():
                self._tasks.start(link, record.request_id, lambda: self._probes.serve(link, record))
            case _:
                log.warning("router %s sent %s to a decode worker; ignored", link.peer, type(record).__name__)

    def gone(self, link: FrameStream) -> None:
        self._tasks.cancel_all(link)

    def load(self) -> Load:
        held, landing = self._engine.load(), self._receiver.stats()
        return Load(
            waiting=held.waiting + len(self._admission),
            waiting_tokens=held.waiting_tokens,
            running=held.running,
            pages_used=held.pages_used,
            pages_total=held.pages_total,
            pages_high_water=held.pages_high_water,
            pages_cached=held.pages_cached,
            prompt_token_s=held.prompt_token_s,
            step_s=held.step_s,
            sequence_s=held.sequence_s,
            handoffs=landing.leases,
            buffer_bytes_used=landing.landing_bytes_used,
            buffer_bytes_total=landing.landing_bytes_total,
            buffer_bytes_quarantined=landing.quarantined_bytes,
            connections_refused=self._guard.refused,
            prefix_lookup_tokens=held.entered_tokens,
            prefix_hit_tokens=held.hit_tokens,
            preemptions=self._engine.preemptions,
        )

    # ---- one request

    async def _serve(self, link: FrameStream, message: Reserve | Decode) -> None:
        """Take the sequence in, decode it to its end; frees everything on every way out."""
        work = message.work
        job = _Job(link, finished=asyncio.get_running_loop().create_future())
        self._jobs[work.request_id] = job
        try:
            async with asyncio.timeout(work.budget_s):
                match message:
                    case Reserve():
                        await self._land(job, message)
                    case Decode():
                        await self._on_engine(lambda engine: engine.add(work))
                    case never:
                        assert_never(never)
                await job.finished
        except TimeoutError:
            answer(link, failure(work.request_id, DeadlineExceeded("the deadline passed during decode")))
        except BatonError as error:
            answer(link, failure(work.request_id, error))
        finally:
            await asyncio.shield(self._free(work))

    async def _land(self, job: _Job, message: Reserve) -> None:
        """Pages, lease, ticket; then the KV arrives and the sequence joins the batch."""
        work = message.work
        write = await self._admission.admit(work, lambda: self._on_engine(lambda engine: self._reserve(engine, work)))
        ticket = self._receiver.reserve(
            work.request_id,
            message.epoch,
            tokens=len(work.known),
            codec=message.codec,
            floor=message.floor,
            budget_s=work.budget_s,
            write=write,
        )
        answer(job.link, Granted(ticket))
        match await self._receiver.outcome(work.request_id):
            case Landed() as landed:
                job.landed, job.landed_s = landed, time.monotonic()
                job.carrier = self._receiver.carrier(work.request_id)
                exact = landed.dtype == self.layout.dtype and landed.codec_tokens.keys() <= EXACT_CODECS
                await self._on_engine(lambda engine: engine.start(work.request_id, landed.first, exact=exact))
                if landed.first.finish:
                    job.finished.set_result(None)
            case Lost(reason=reason):
                raise Unavailable(f"the handoff was lost: {reason}", reason=HANDOFF_LOST)
            case Expired():
                raise DeadlineExceeded("the handoff's lease expired", reason="handoff_expired")
            case never:
                assert_never(never)

    async def _free(self, work: Work) -> None:
        """The receiver first: pages may only be freed when no landing thread can write them any more."""
        await self._receiver.release(work.request_id)
        with contextlib.suppress(Unavailable):  # a broken engine holds nothing that outlives the process
            await asyncio.wrap_future(self._loop.call(lambda engine: engine.release(work.request_id), bounded=False))
        self._jobs.pop(work.request_id, None)
        self._admission.freed()

    def _on_engine(self, act: Callable[[Engine], T]) -> asyncio.Future[T]:
        """``act`` between two steps of the engine, awaitable here."""
        return asyncio.wrap_future(self._loop.call(act))

    # ---- called on the engine thread

    def _reserve(self, engine: Engine, work: Work) -> Write:
        """Pages for ``work``'s whole prompt, and the way into them."""
        pages, device = engine.reserve(work), self._on_device
        if device is None and isinstance(cache := engine.cache, KVCache):
            inside = cache.locator(pages)
            return Paged(lambda layer, start, count: Rows(*inside(layer, start, count)))
        if device is None:
            return lambda layer, start, keys, values: engine.cache.scatter(layer, pages, start, keys, values)
        free = device.mark()  # whoever had the pages before may still be writing them
        there = device.locator(pages)

        def locate(layer: int, start: int, count: int) -> Rows:
            free()
            return Rows(*there(layer, start, count))

        return Paged(locate)

    def _computed(self, events: list[TokenEvent]) -> None:
        now_s = time.monotonic()
        reports = [self._report(event, now_s) for event in events if self._is_first(event)]
        self._events.call_soon_threadsafe(self._deliver, events, reports)

    def _is_first(self, event: TokenEvent) -> bool:
        job = self._jobs.get(event.request_id)
        return job is not None and not job.reported

    def _report(self, event: TokenEvent, now_s: float) -> Report:
        """Stages up to the first token computed here; the router adds the decode time after it."""
        job, timing = self._jobs[event.request_id], self._engine.timing(event.request_id)
        job.reported = True
        if job.landed is None:
            return Report(event.request_id, {"queue": timing.queue_s, "prefill": timing.prefill_s})
        scheduled_s = timing.scheduled_s if timing.scheduled_s is not None else now_s
        stages = {
            "encode": job.landed.encode_s,
            "wire": job.landed.wire_s,
            "land": job.landed.land_s,
            "wait": scheduled_s - job.landed_s,
            "decode": now_s - scheduled_s,
        }
        landed = job.landed
        return Report(event.request_id, stages, landed.busy_s, landed.bytes, dict(landed.codec_tokens), job.carrier)

    def _broke(self, error: BaseException) -> None:
        self.failure = error
        self._events.call_soon_threadsafe(self._fail_all)

    # ---- back on the event loop

    def _fail_all(self) -> None:
        for job in self._jobs.values():
            if not job.finished.done():
                job.finished.set_exception(Unavailable(f"the engine of {self.worker_id} failed: {self.failure!r}"))

    def _deliver(self, events: list[TokenEvent], reports: list[Report]) -> None:
        """One Tokens frame per router, with every token of this step that is for it."""
        for report in reports:
            if (job := self._jobs.get(report.request_id)) is not None:
                answer(job.link, report)
        frames: dict[FrameStream, list[TokenEvent]] = defaultdict(list)
        for event in events:
            job = self._jobs.get(event.request_id)
            if job is None:
                continue
            if event.finish == BROKEN:
                if not job.finished.done():
                    job.finished.set_exception(Internal(f"{self.worker_id} computed no finite logits"))
                continue
            frames[job.link].append(event)
            if event.finish and not job.finished.done():
                job.finished.set_result(None)
        for link, batch in frames.items():
            answer(link, Tokens(tuple(batch)))
