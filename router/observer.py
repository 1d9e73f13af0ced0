"""Tells of every request: its meters, its line in the log, its spans. The service says what happens, nothing more.

with observer.request(...) as seen:      arrival to end, whatever the end is
    seen.understood(...)                 what it asks for
    with seen.output(run, assembler):    once per output
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from baton import logs
from baton.config import Config
from baton.errors import BatonError, Forbidden, InvalidRequest, NotFound, Overloaded, Unauthenticated
from baton.wire import inference_pb2 as pb
from router import validate
from router.gate import Metadata
from router.meters import Ended, Meters, Objectives
from router.respond import Assembler
from router.run import Run
from router.tracing import Output, Story, Tracing
from router.validate import ParsedRequest

log = logging.getLogger(__name__)

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
REJECTIONS = (InvalidRequest, NotFound, Unauthenticated, Forbidden, Overloaded)


class Observer:
    """One per router."""

    def __init__(self, config: Config, *, router_id: str, tracing: Tracing | None = None) -> None:
        """tracing: None for what the configuration says."""
        self._model, self.log_prompts = config.model.id, config.observe.log_prompts
        classes = config.admission.classes
        self.meters = Meters({name: Objectives(one.ttft_ms / 1e3, one.tpot_ms / 1e3) for name, one in classes.items()})
        self._default_class = config.admission.default_class
        self.tracing = tracing or (Tracing(instance=router_id) if config.observe.traces else None)

    async def close(self) -> None:
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @contextlib.contextmanager
    def request(self, request: pb.GenerateRequest, arrived_s: float, metadata: Metadata) -> Iterator[Seen]:
        """Open from arrival to end. metadata: HTTP headers or gRPC metadata, which may name a trace."""
        operation = "chat" if request.WhichOneof("input") == "chat" else "text_completion"
        slo_class = request.slo_class or self._default_class
        seen = Seen(self.meters, operation, slo_class, arrived_s, asked=validate.outputs(request))
        trace = TRACEPARENT.fullmatch(str(metadata.get("traceparent", "")))
        logs.about(trace_id=trace[1] if trace else "")
        if self.log_prompts:
            log.info("asked", extra={"prompt": _prompt(request)})
        try:
            yield seen
        except (asyncio.CancelledError, GeneratorExit):
            seen.error = "CANCELLED"
            raise
        except BatonError as error:
            seen.error = error.code
            self._errored(seen, error)
            raise
        except BaseException:
            seen.error = "INTERNAL"
            self.meters.failed(seen.error, seen.slo_class, seen.outputs_left)
            raise
        finally:
            self._told(seen, metadata)

    def _errored(self, seen: Seen, error: BatonError) -> None:
        if isinstance(error, REJECTIONS):
            overload = isinstance(error, Overloaded)
            self.meters.rejected(_reason(error), seen.slo_class if overload else "", seen.outputs_left)
        else:
            self.meters.failed(error.code, seen.slo_class, seen.outputs_left)

    def _told(self, seen: Seen, metadata: Metadata) -> None:
        """The line and the spans of a request that is over."""
        story = Story(
            operation=seen.operation,
            model=self._model,
            request_id=seen.request_id,
            arrived_s=seen.arrived_s,
            ended_s=time.monotonic(),
            error=seen.error,
            attributes={"baton.slo_class": seen.slo_class, **_asked(seen.parsed)},
            outputs=seen.outputs,
        )
        if self.tracing is not None:
            logs.about(trace_id=self.tracing.record(story, metadata))
        if log.isEnabledFor(logging.INFO):
            log.info("request ended: %s", seen.error or "OK", extra=_summary(story))


@dataclass(slots=True)
class Seen:
    """What is known of one request so far."""

    meters: Meters
    operation: str
    slo_class: str
    arrived_s: float
    asked: int = 1  # outputs
    parsed: ParsedRequest | None = None
    error: str = ""
    outputs: list[Output] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.parsed.request_id if self.parsed else ""

    @property
    def outputs_left(self) -> int:
        """Outputs that were asked for and have not ended."""
        return self.asked - sum(bool(output.finish) for output in self.outputs)

    def understood(self, parsed: ParsedRequest) -> None:
        self.parsed = parsed
        logs.about(client_request_id=parsed.request_id)

    @contextlib.contextmanager
    def output(self, run: Run, assembler: Assembler) -> Iterator[None]:
        """While one output is computed. Leaving it in peace means that it ended as the client wished."""
        logs.about(request_id=run.work.request_id)
        try:
            yield
        except BaseException:
            self.outputs.append(Output(run, assembler.tokens, ""))
            raise
        self.outputs.append(Output(run, assembler.tokens, assembler.finish_reason))
        self.meters.ended(
            Ended(
                operation=self.operation,
                slo_class=self.slo_class,
                prompt_tokens=len(run.work.prompt),
                output_tokens=assembler.tokens,
                ttft_s=max(0.0, run.first_token_s - run.arrived_s),
                ledger=run.ledger(),
                codec_tokens=run.codec_tokens,
                carrier=run.carrier,
            )
        )


def _reason(error: BatonError) -> str:
    if isinstance(error, Overloaded):
        return error.reason or "worker"
    return error.reason or error.code.lower()


def _prompt(request: pb.GenerateRequest) -> object:
    match request.WhichOneof("input"):
        case "chat":
            return [{"role": message.role, "content": message.content} for message in request.chat.messages]
        case "token_ids":
            return list(request.token_ids.ids)
        case _:
            return request.prompt


def _asked(parsed: ParsedRequest | None) -> Mapping[str, str | int | float | bool]:
    """Numbers of the request that the GenAI conventions name; nothing of its text."""
    if parsed is None:
        return {}
    sampling = parsed.sampling
    return {
        "gen_ai.request.choice.count": parsed.outputs,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.seed": sampling.seed,
    }


def _summary(story: Story) -> dict[str, object]:
    """What the line of a request says beside its ids: counts and times."""
    runs = [output.run for output in story.outputs]
    first_s = min((run.first_token_s for run in runs if run.first_token_s), default=0.0)
    return {
        "operation": story.operation,
        "seconds": round(story.ended_s - story.arrived_s, 4),
        "ttft_s": round(first_s - story.arrived_s, 4) if first_s else None,
        "prompt_tokens": len(runs[0].work.prompt) if runs else 0,
        "output_tokens": sum(output.tokens for output in story.outputs),
        "attempts": sum(len(run.tries) for run in runs),
        "workers": sorted({worker for run in runs for attempt in run.tries for worker in attempt.by_role.values()}),
    }
