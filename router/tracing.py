"""OpenTelemetry spans of a request, made from what its workers reported, when it ends (ADR 17).

    chat MODEL ── admit ─ queue ─ prefill ─ transfer ─ wait ─ decode ─ (recover ─ queue ... elsewhere) ─ deliver
                                            └─ encode ─ wire ─ land

Workers measure their own stages and report seconds; the router lays them end to end on its own clock. So one trace
holds all processes without a common clock, and no worker exports anything. Needs the extra ``otel``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.errors import ConfigError
from router.gate import Metadata
from router.metrics import PROVIDER
from router.peers import Role
from router.run import Attempt, Run

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue

Attributes = dict[str, "AttributeValue"]

SERVICE_NAME = "baton-router"
EXPORTERS = ("otlp", "console", "none")
PROTOCOLS = ("http/protobuf", "grpc")
TRANSFER = ("encode", "wire", "land")


@dataclass(frozen=True, slots=True)
class Output:
    """One of a request's outputs, ended or broken off."""

    run: Run
    tokens: int
    finish: str  # "stop", "length" or "" where it was broken off


@dataclass(frozen=True, slots=True)
class Story:
    """A request from its arrival to its end. Times are monotonic seconds; ``error``: gRPC's code, "" for none."""

    operation: str
    model: str
    request_id: str
    arrived_s: float
    ended_s: float
    error: str
    attributes: Mapping[str, str | int | float | bool]
    outputs: Sequence[Output]


class Tracing:
    """Records stories as spans. One per process."""

    def __init__(self, exporter: SpanExporter | None = None, *, instance: str = "") -> None:
        """exporter: None for the one that ``OTEL_*`` asks for. Raises :class:`ConfigError` where that cannot be."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"{error}: install baton[otel]", field="observe.traces") from None
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        identity = {"service.instance.id": instance} | ({} if named else {"service.name": SERVICE_NAME})
        self._provider = TracerProvider(resource=Resource.create(identity), shutdown_on_exit=False)
        exporter = exporter or exporter_of(os.environ)
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))  # bounded: it drops what it cannot send
        self._tracer: Tracer = self._provider.get_tracer("baton")

    def close(self) -> None:
        """Sends what waits; blocks for as long as the exporter may take."""
        self._provider.shutdown()

    def record(self, story: Story, metadata: Metadata) -> str:
        """``story`` as spans below the one that ``metadata`` names; returns the trace's id in hexadecimal."""
        from opentelemetry import propagate, trace

        start = _Clock.now()
        carrier = {name: value for name, value in metadata.items() if isinstance(value, str)}
        root = self._tracer.start_span(
            f"{story.operation} {story.model}",
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=_described(story),
            start_time=start.ns(story.arrived_s),
        )
        if story.error:
            root.set_status(trace.StatusCode.ERROR, story.error)
        if root.is_recording():
            for index, output in enumerate(story.outputs):
                _Drawn(self._tracer, root, start, {"baton.output": index}).output(output, story.ended_s)
        root.end(start.ns(story.ended_s))
        return trace.format_trace_id(root.get_span_context().trace_id)


def exporter_of(environ: Mapping[str, str]) -> SpanExporter | None:
    """The exporter that the standard variables ask for; everything else about it the SDK reads itself."""
    wanted = environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = protocol or PROTOCOLS[0]
    if wanted not in EXPORTERS:
        raise ConfigError(f"must be one of {', '.join(EXPORTERS)}; got {wanted!r}", field="OTEL_TRACES_EXPORTER")
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"must be one of {', '.join(PROTOCOLS)}; got {protocol!r}", field="OTEL_EXPORTER_OTLP_PROTOCOL"
        )
    if wanted == "none":
        return None
    if wanted == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return GrpcExporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    except ImportError as error:
        raise ConfigError(f"{error}: install baton[otel]", field="observe.traces") from None


@dataclass(frozen=True, slots=True)
class _Clock:
    """From this process's monotonic seconds to nanoseconds since the epoch."""

    epoch_ns: int

    @classmethod
    def now(cls) -> _Clock:
        return cls(time.time_ns() - time.monotonic_ns())

    def ns(self, at_s: float) -> int:
        return self.epoch_ns + int(at_s * 1e9)


class _Drawn:
    """Draws one output's stages below ``root``."""

    def __init__(self, tracer: Tracer, root: Span, clock: _Clock, common: Attributes) -> None:
        self._tracer, self._clock, self._common = tracer, clock, common
        self._below: Context = _under(root)

    def output(self, output: Output, ended_s: float) -> None:
        """ended_s: when the request did, which is the end of an output that was broken off."""
        run = output.run
        at_s, last_s = run.arrived_s, run.last_token_s if output.finish else ended_s
        for number, attempt in enumerate(run.tries):
            until_s = run.tries[number + 1].begun_s if number + 1 < len(run.tries) else last_s
            about: Attributes = {"baton.attempt": number}
            self._span("recover" if number else "admit", at_s, attempt.dispatched_s or until_s, about)
            if attempt.dispatched_s:
                at_s = self._attempt(attempt, about, until_s)
            if until_s != last_s:  # what an attempt that was lost brought counts until its last token
                at_s = max(at_s, attempt.last_token_s)
        if output.finish:
            self._span("deliver", at_s, run.last_token_s, {})

    def _attempt(self, attempt: Attempt, about: Attributes, until_s: float) -> float:
        """The stages that its workers reported, one after the other, none past ``until_s``; returns where they end."""
        if attempt.failed:
            about = about | {"error.type": "worker_failed", "baton.failed_workers": sorted(attempt.failed)}
        reported = attempt.report.stages
        seconds = reported | {"decode": reported.get("decode", 0.0) + attempt.decoded_s}
        at_s = attempt.dispatched_s
        for stage in ("queue", "prefill", "transfer", "wait", "decode"):
            if stage == "transfer":
                at_s = self._transfer(attempt, about, at_s, until_s)
            elif stage in seconds:
                end_s = _end(at_s, seconds[stage], until_s)
                self._span(stage, at_s, end_s, about | _worker(attempt, stage))
                at_s = end_s
        return at_s

    def _transfer(self, attempt: Attempt, about: Attributes, at_s: float, until_s: float) -> float:
        """The part of the handoff that prefill did not hide, as one span over its three stages."""
        report = attempt.report
        if not report.transfer_bytes:
            return at_s
        end_s = _end(at_s, sum(report.stages.get(stage, 0.0) for stage in TRANSFER), until_s)
        handoff: Attributes = {
            "baton.handoff.transport": attempt.transport,
            "baton.handoff.carrier": report.carrier,
            "baton.handoff.codecs": sorted(report.codec_tokens),
            "baton.handoff.bytes": report.transfer_bytes,
            "baton.handoff.busy_s": report.transfer_busy_s,
        }
        workers: Attributes = {f"baton.{role}.worker.id": worker for role, worker in attempt.by_role.items()}
        below = _under(self._span("transfer", at_s, end_s, about | workers | handoff))
        for stage in TRANSFER:
            stage_end_s = _end(at_s, report.stages.get(stage, 0.0), end_s)
            self._span(stage, at_s, stage_end_s, about, below)
            at_s = stage_end_s
        return end_s

    def _span(
        self, name: str, start_s: float, end_s: float, attributes: Attributes, below: Context | None = None
    ) -> Span:
        from opentelemetry import trace

        span = self._tracer.start_span(
            name,
            context=below or self._below,
            attributes=self._common | attributes,
            start_time=self._clock.ns(start_s),
        )
        if "error.type" in attributes:
            span.set_status(trace.StatusCode.ERROR)
        span.end(self._clock.ns(max(start_s, end_s)))
        return span


def _under(span: Span) -> Context:
    from opentelemetry import trace

    return trace.set_span_in_context(span)


def _end(at_s: float, seconds: float, until_s: float) -> float:
    """The end of a stage that begins at ``at_s``, not beyond ``until_s``."""
    return min(at_s + max(0.0, seconds), max(at_s, until_s))


def _worker(attempt: Attempt, stage: str) -> Attributes:
    """Who computed ``stage``: without a prefill worker the decode worker did it all."""
    roles: tuple[Role, ...] = ("prefill", "decode") if stage in ("queue", "prefill") else ("decode",)
    return {"baton.worker.id": next((attempt.by_role[role] for role in roles if role in attempt.by_role), "")}


def _described(story: Story) -> Attributes:
    """The root's attributes, by the GenAI conventions' names where they have one."""
    described: Attributes = {
        "gen_ai.operation.name": story.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": story.model,
        "gen_ai.response.id": story.request_id,
        **story.attributes,
    }
    if story.outputs:
        described["gen_ai.usage.input_tokens"] = len(story.outputs[0].run.work.prompt)
        described["gen_ai.usage.output_tokens"] = sum(output.tokens for output in story.outputs)
        described["gen_ai.response.model"] = story.model
        described["gen_ai.response.finish_reasons"] = [output.finish or "error" for output in story.outputs]
        first_s = min((output.run.first_token_s for output in story.outputs if output.run.first_token_s), default=0.0)
        if first_s:
            described["gen_ai.response.time_to_first_chunk"] = first_s - story.arrived_s
    if story.error:
        described["error.type"] = story.error
    return described
