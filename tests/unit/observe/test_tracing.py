"""Spans of a request: one trace below the caller's, stages that fill it in their order, attempts told apart."""

from __future__ import annotations

import http.server
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from baton.errors import ConfigError
from baton.messages import Report
from baton.request import Sampling, Work
from router.run import Attempt, InOrder, Run
from router.tracing import Output, Story, Tracing, exporter_of

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
WORK = Work("r-1", (1, 2, 3), Sampling(), 0, 60.0)
STAGES = {"queue": 0.1, "prefill": 0.4, "encode": 0.05, "wire": 0.1, "land": 0.05, "wait": 0.1, "decode": 0.1}


def attempt(begun_s: float, *, failed: str = "", **fields: Any) -> Attempt:
    report = Report("r-1", STAGES, 0.5, 4096, {"raw": 10}, "cma/memory")
    made = Attempt(
        WORK, 60.0, 0, InOrder(), begun_s=begun_s, dispatched_s=begun_s + 0.1, transport="nixl", report=report
    )
    made.by_role.update({"prefill": "p-1", "decode": "d-1"})
    made.failed = frozenset([failed] if failed else [])
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def story(*tries: Attempt, error: str = "", finish: str = "stop", last_token_s: float = 12.0) -> Story:
    run = Run(WORK, "raw", 10.0, 70.0, tries=list(tries), first_token_s=10.6, last_token_s=last_token_s)
    return Story(
        operation="chat",
        model="m",
        request_id="mine",
        arrived_s=10.0,
        ended_s=last_token_s + 0.5,
        error=error,
        attributes={"baton.slo_class": "batch"},
        outputs=[Output(run, 5, finish)],
    )


def spans(told: Story, metadata: dict[str, str | bytes] | None = None) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, instance="router-1")
    tracing.record(told, CALLER if metadata is None else metadata)
    tracing.close()
    return sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time or 0, -(span.end_time or 0)))


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_one_trace_below_the_callers_span() -> None:
    told = spans(story(attempt(10.0, first_decode_s=11.1, last_token_s=11.9)))
    root = told[0]
    assert {format(span.context.trace_id, "032x") for span in told if span.context} == {TRACE}
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT
    assert (root.name, root.kind, root.status.status_code) == ("chat m", SpanKind.SERVER, StatusCode.UNSET)
    about = dict(root.attributes or {})
    assert about["gen_ai.operation.name"] == "chat"
    assert about["gen_ai.usage.input_tokens"] == 3
    assert about["gen_ai.usage.output_tokens"] == 5
    assert about["gen_ai.response.finish_reasons"] == ("stop",)
    assert about["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.6)
    assert root.resource.attributes["service.name"] == "baton-router"


def test_the_stages_fill_the_request_in_their_order() -> None:
    told = spans(story(attempt(10.0, first_decode_s=11.1, last_token_s=11.9)))
    top = [span for span in told if span.parent and told[0].context and span.parent.span_id == told[0].context.span_id]
    assert [span.name for span in top] == ["admit", "queue", "prefill", "transfer", "wait", "decode", "deliver"]
    for before, after in itertools.pairwise(top):
        assert abs((after.start_time or 0) - (before.end_time or 0)) < 1000
    assert sum(map(seconds, top)) == pytest.approx(2.0)  # from arrival to the last token
    by_name = {span.name: span for span in told}
    assert seconds(by_name["transfer"]) == pytest.approx(0.2)
    assert sum(seconds(by_name[name]) for name in ("encode", "wire", "land")) == pytest.approx(0.2)
    assert seconds(by_name["decode"]) == pytest.approx(0.9)
    handoff = dict(by_name["transfer"].attributes or {})
    assert (handoff["baton.handoff.bytes"], handoff["baton.handoff.carrier"]) == (4096, "cma/memory")
    assert (handoff["baton.prefill.worker.id"], handoff["baton.decode.worker.id"]) == ("p-1", "d-1")
    assert (by_name["prefill"].attributes or {})["baton.worker.id"] == "p-1"
    assert (by_name["decode"].attributes or {})["baton.worker.id"] == "d-1"


def test_a_failed_attempt_has_its_own_spans_and_ends_where_the_next_begins() -> None:
    lost = attempt(10.0, failed="d-1", first_decode_s=0.0, last_token_s=10.6)
    next_one = attempt(11.0, first_decode_s=11.9, last_token_s=12.0)
    told = spans(story(lost, next_one))
    first = [span for span in told if (span.attributes or {}).get("baton.attempt") == 0]
    second = [span for span in told if (span.attributes or {}).get("baton.attempt") == 1]
    assert "recover" in [span.name for span in second]
    begun = min(span.end_time or 0 for span in second if span.name == "recover")
    assert all((span.end_time or 0) <= begun for span in first)
    failed = [span for span in first if (span.attributes or {}).get("baton.failed_workers") == ("d-1",)]
    assert failed
    assert {span.status.status_code for span in failed} == {StatusCode.ERROR}
    assert all(span.status.status_code is StatusCode.UNSET for span in second)


def test_a_request_that_fails_says_so_and_one_without_a_caller_begins_a_trace() -> None:
    root, *_ = spans(story(attempt(10.0), error="UNAVAILABLE", finish=""), metadata={"x-bin": b"\x00"})
    assert root.parent is None
    assert (root.attributes or {})["error.type"] == "UNAVAILABLE"
    assert root.status.status_code is StatusCode.ERROR


def test_a_caller_that_does_not_sample_is_obeyed() -> None:
    assert spans(story(attempt(10.0)), metadata={"traceparent": f"00-{TRACE}-{PARENT}-00"}) == []


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP receiver that keeps what it gets."""

    bodies: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bytes]]]:
    bodies: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"bodies": bodies})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my-baton")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield bodies
        server.shutdown()
        thread.join(5.0)


def test_the_standard_variables_lead_to_a_real_receiver(collector: list[tuple[str, bytes]]) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    tracing = Tracing(instance="router-1")
    tracing.record(story(attempt(10.0, first_decode_s=11.1, last_token_s=11.9)), CALLER)
    tracing.close()
    [(path, body)] = collector
    assert path == "/v1/traces"
    [resource] = otlp.ExportTraceServiceRequest.FromString(body).resource_spans
    about = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("my-baton", "router-1")
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert {"chat m", "prefill", "transfer", "decode"} <= set(names)


def test_what_the_variables_cannot_mean_is_refused() -> None:
    assert exporter_of({"OTEL_TRACES_EXPORTER": "none"}) is None
    with pytest.raises(ConfigError, match=r"OTEL_TRACES_EXPORTER.*zipkin"):
        exporter_of({"OTEL_TRACES_EXPORTER": "zipkin"})
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL.*http/json"):
        exporter_of({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})
