"""The methods of the public contract, on top of the dispatcher. Knows gRPC's context, not Serve.

``stream`` reads as a request lives: validate, admit, dispatch, assemble, account. gRPC and HTTP (``router.openai``) are
its two fronts: what is raised here leaves there as a gRPC status whose details name the field, or as an HTTP status
with an error body; nothing is raised to a server, so that trailers always reach the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.message import DecodeError

from baton.api_keys import ANYBODY, Caller
from baton.config import Config
from baton.config_routing import BLIND
from baton.errors import BatonError, DeadlineExceeded, Internal, InvalidRequest, Overloaded
from baton.ledger import blend
from baton.secure import load_key
from baton.wire import inference_pb2 as pb
from engine.spec import ModelSpec
from engine.text import Tokenizer
from router import respond, status, validate
from router.choice import Choice
from router.dispatch import Dispatcher
from router.entry import Entry
from router.gate import Gate, Metadata
from router.handlers import within_deadline
from router.health import Health
from router.interleave import interleave
from router.observer import REJECTIONS, Observer, Seen
from router.peers import Peer, Pools, Role, WorkerAddress
from router.recovery import Patience
from router.run import Run
from router.siblings import Siblings

T = TypeVar("T")
log = logging.getLogger(__name__)

ROLES: tuple[Role, ...] = ("prefill", "decode")
LONG_INPUT_BYTES = 4 << 10  # longer inputs are tokenized on a thread: 4 KiB take about 3 ms of the event loop
MOST_QUESTIONS = 32  # calls of Tokenize and Detokenize at a time; they share threads with prompts
RETRY_AFTER_MS = 500


@dataclass(slots=True)
class Counters:
    """What this router has done since it started; ``inflight`` returns to zero when it is idle."""

    inflight: int = 0
    accepted: int = 0
    refused: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    retried: int = 0


class InferenceService:
    """One router. ``pools`` must be fed by a directory; ``folder`` is the model's (tokenizer and config only)."""

    def __init__(self, config: Config, folder: Path, *, router_id: str) -> None:
        spec = ModelSpec.from_folder(folder)
        self._config, self._router_id = config, router_id
        self._tokenizer = Tokenizer(folder)
        self._limits = validate.Limits.of(config, context_tokens=min(config.model.max_context, spec.max_context))
        key = load_key(config.security)
        self.gate = Gate(config, key)
        self.pools = Pools(connect_s=config.router.connect_s, key=key, watch_caches=config.router.strategy not in BLIND)
        self._disaggregated = config.prefill.replicas > 0
        self._choice = Choice(
            self.pools,
            decode_page_tokens=config.decode.page_tokens,
            disaggregated=self._disaggregated,
            local_prefill=config.router.local_prefill,
            routing=config.router,
        )
        self._entry = Entry(config.admission, self.pools)
        self._dispatcher = Dispatcher(
            self._choice,
            Patience(config.router.retries, config.router.recovery_s),
            retried=self._retried,
        )
        self.observer = Observer(config, router_id=router_id)
        self.siblings = Siblings(router_id)
        self.health = Health(lambda: self.ready)
        self._counters = Counters()
        self._questions = 0  # that are being answered
        self._refusals: Counter[str] = Counter()  # with RESOURCE_EXHAUSTED, by reason
        self._codec_tokens: Counter[str] = Counter()  # (layer, token) pairs handed over, by codec

    @property
    def ready(self) -> bool:
        """Whether a request could be served now: a worker of every role it needs is connected."""
        return bool(self.pools.of("decode")) and (not self._disaggregated or bool(self.pools.of("prefill")))

    def usable(self) -> dict[str, int]:
        """How many workers of each role a request could go to now, those included that only do for want of others."""
        return {role: len(self.pools.of(role)) for role in ROLES}

    async def close(self) -> None:
        await self._entry.close()
        await self.pools.close()
        await self.observer.close()

    @property
    def limits(self) -> validate.Limits:
        """What this deployment serves and allows."""
        return self._limits

    def admit(self, metadata: Metadata) -> Caller:
        """Whose call it is, before its body is read. Raises as the gate does, and :class:`Overloaded` over the rate."""
        caller = self.gate.admit(metadata)
        try:
            self._entry.look(caller)
        except Overloaded as error:
            self._counters.refused += 1
            self._refusals[error.reason] += 1
            self.observer.meters.rejected(error.reason, self._config.admission.default_class)
            raise
        return caller

    # ---- generation

    async def generate(self, body: bytes, context: status.Context) -> AsyncGenerator[pb.GenerateResponse]:
        """The gRPC method: as :meth:`stream`, with errors set on ``context``."""
        arrived_s = time.monotonic()
        try:
            metadata = status.metadata(context)
            caller = self._counted(lambda: self.gate.admit(metadata))
            request = within_deadline(self._counted(lambda: _decoded(pb.GenerateRequest, body)))
            async with aclosing(
                self.stream(request, arrived_s=arrived_s, caller=caller, metadata=metadata)
            ) as responses:
                async for response in responses:
                    yield response
        except BatonError as error:
            status.set_on(context, error)
        except Exception:  # the process's outer boundary: the client learns that it is a bug, the log learns which
            log.exception("request failed")
            status.set_on(context, Internal("internal error; the router's log has the details"))

    async def stream(
        self,
        request: pb.GenerateRequest,
        *,
        arrived_s: float,
        caller: Caller = ANYBODY,
        metadata: Metadata = MappingProxyType({}),
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """The outputs of one request; see the contract for the errors. Closing it frees the request everywhere.

        arrived_s: monotonic time at which the request reached this process; its budget runs from there.
        caller: whom the gate let in; the request counts against that tenant's limits.
        metadata: HTTP headers or gRPC metadata, which may name the trace that this belongs to.
        """
        with self.observer.request(request, arrived_s, metadata) as seen, self._counted_in(validate.outputs(request)):
            self._entry.charge(caller)
            parsed = await self._parse(request)
            seen.understood(parsed)
            uncached_tokens = self._choice.uncached(parsed.work(secrets.token_hex(8)))
            async with self._entry.turn(parsed, caller, arrived_s=arrived_s, uncached_tokens=uncached_tokens) as turn:
                self._counters.accepted += parsed.outputs
                async with aclosing(self._outputs(parsed, seen)) as responses:
                    async for response in responses:
                        self._entry.came(turn, len(response.token_ids))
                        yield response

    async def _parse(self, request: pb.GenerateRequest) -> validate.ParsedRequest:
        def parse() -> validate.ParsedRequest:
            return validate.parse(request, self._limits, self._tokenizer, seed=secrets.randbits(63))

        long = request.ByteSize() > LONG_INPUT_BYTES
        return await asyncio.to_thread(parse) if long else parse()

    def _counted(self, parse: Callable[[], T]) -> T:
        """What ``parse`` returns; an input that it refuses is counted."""
        try:
            return parse()
        except BatonError:
            self._counters.refused += 1
            raise

    def _retried(self, reason: str) -> None:
        self._counters.retried += 1
        self.observer.meters.retried(reason)

    @contextlib.contextmanager
    def _counted_in(self, outputs: int) -> Iterator[None]:
        """Counts the request, once for each of its outputs, while it is here, and how it ended. Raises Overloaded."""
        counters, held = self._counters, self._counters.inflight
        counters.inflight += outputs
        try:
            if held + outputs > self._config.router.max_inflight:
                message = f"{held} requests are in flight already"
                raise Overloaded(message, retry_after_ms=RETRY_AFTER_MS, reason="inflight")
            yield
            counters.completed += outputs
        except (asyncio.CancelledError, GeneratorExit, DeadlineExceeded):
            counters.cancelled += outputs
            raise
        except REJECTIONS as error:
            counters.refused += outputs
            if isinstance(error, Overloaded):
                self._refusals[error.reason or "worker"] += outputs
            raise
        except BaseException:
            counters.failed += outputs
            raise
        finally:
            counters.inflight -= outputs

    def _outputs(self, parsed: validate.ParsedRequest, seen: Seen) -> AsyncGenerator[pb.GenerateResponse]:
        """Every output of the request. Most have one: no layers between it and the client."""
        return self._respond(parsed, seen, 0) if parsed.outputs == 1 else self._interleaved(parsed, seen)

    async def _interleaved(self, parsed: validate.ParsedRequest, seen: Seen) -> AsyncGenerator[pb.GenerateResponse]:
        """The first output computes the prompt; the others start once it has, and find it in the prefix cache."""
        computed = asyncio.Event()

        async def output(index: int) -> AsyncGenerator[pb.GenerateResponse]:
            if index > 0:
                await computed.wait()
            async with aclosing(self._respond(parsed, seen, index)) as responses:
                async for response in responses:
                    computed.set()
                    yield response

        async with aclosing(interleave([output(index) for index in range(parsed.outputs)])) as responses:
            async for _, response in responses:
                yield response

    async def _respond(
        self, parsed: validate.ParsedRequest, seen: Seen, output: int
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Dispatches and assembles: one response per batch of tokens, the last one with usage and ledger."""
        request_id = f"{self._router_id}-{secrets.token_hex(8)}"  # clients may reuse their ids, workers may not
        work = parsed.work(request_id, output)
        run = Run(work, parsed.codec, seen.arrived_s, floor=parsed.floor, deadline_s=seen.arrived_s + work.budget_s)
        assembler = respond.Assembler(parsed, self._tokenizer, model=self._config.model.id, output=output)
        try:
            with seen.output(run, assembler):
                async with aclosing(self._dispatcher.stream(run)) as batches:
                    async for events in batches:
                        response = assembler.push(events)
                        if response is not None:
                            self._counters.tokens += len(response.token_ids)
                            yield response
                        if assembler.finished:
                            break
        finally:
            self._codec_tokens.update(run.codec_tokens)
        yield assembler.finish(run.ledger())

    # ---- the other methods

    async def tokenize(self, request: bytes | pb.TokenizeRequest, caller: Caller = ANYBODY) -> pb.TokenizeResponse:
        """Raises :class:`BatonError` as the contract has it."""

        def tokenize() -> list[int]:
            decoded = _decoded(pb.TokenizeRequest, request) if isinstance(request, bytes) else request
            return validate.tokenize(decoded, self._limits, self._tokenizer)

        ids = await self._asked(tokenize, caller)
        return pb.TokenizeResponse(token_ids=ids, max_context_tokens=self._limits.context_tokens)

    async def detokenize(
        self, request: bytes | pb.DetokenizeRequest, caller: Caller = ANYBODY
    ) -> pb.DetokenizeResponse:
        """Raises :class:`BatonError` as the contract has it."""

        def detokenize() -> str:
            decoded = _decoded(pb.DetokenizeRequest, request) if isinstance(request, bytes) else request
            return validate.detokenize(decoded, self._limits, self._tokenizer)

        return pb.DetokenizeResponse(text=await self._asked(detokenize, caller))

    async def _asked(self, answer: Callable[[], T], caller: Caller) -> T:
        """What ``answer`` returns, computed on a thread: a request of ``caller``'s, and one of few at a time."""
        if self._questions >= MOST_QUESTIONS:
            message = f"{self._questions} prompts are being tokenized already"
            raise Overloaded(message, retry_after_ms=RETRY_AFTER_MS, reason="inflight")
        self._questions += 1
        try:
            self._entry.charge(caller)
            return await asyncio.to_thread(answer)
        finally:
            self._questions -= 1

    def list_models(self) -> pb.ListModelsResponse:
        model = pb.Model(
            id=self._config.model.id,
            max_context_tokens=self._limits.context_tokens,
            vocab_size=self._tokenizer.vocab_size,
            eos_token_ids=sorted(self._tokenizer.eos_token_ids),
            dtype=hello.dtype if (hello := self.pools.hello) else "",
        )
        return pb.ListModelsResponse(models=[model])

    def report(self) -> pb.GetStatusResponse:
        """What workers and router hold now."""
        handoff = self._config.handoff
        return pb.GetStatusResponse(
            model=self._config.model.id,
            layout=hello.layout if (hello := self.pools.hello) else "",
            pools=[pb.Pool(role=role, workers=[_worker(*known) for known in self.pools.known(role)]) for role in ROLES],
            transport=handoff.transport if self._disaggregated else "",
            codec=handoff.codec,
            codecs_used=blend(self._codec_tokens),
            quality_floor=handoff.quality_floor,
            router=pb.RouterStatus(
                id=self._router_id,
                waiting=self._entry.waiting,
                refusals=self._refusals,
                **asdict(self._counters),
            ),
        )


Message = TypeVar("Message", pb.GenerateRequest, pb.TokenizeRequest, pb.DetokenizeRequest)


def _decoded(kind: type[Message], body: bytes) -> Message:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise InvalidRequest("request", f"is not a {kind.DESCRIPTOR.full_name}: {error}") from None


def _worker(address: WorkerAddress, peer: Peer | None, listed: bool) -> pb.Worker:
    if peer is None:
        state = pb.WORKER_STATE_CONNECTING
    elif peer.draining or not listed:
        state = pb.WORKER_STATE_DRAINING
    else:
        suspected = peer.suspicion.shunned(time.monotonic())
        state = pb.WORKER_STATE_SUSPECT if suspected else pb.WORKER_STATE_READY
    return pb.Worker(
        id=address.worker_id,
        address=f"{address.host}:{address.port}",
        generation=address.generation,
        state=state,
        load=pb.Load(**asdict(peer.load)) if peer else None,
        load_age_s=peer.load_age_s if peer else 0.0,
    )
