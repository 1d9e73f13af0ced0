"""What the running service tells of its requests: metrics, one line each, spans; and that no prompt is in any of it."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from baton import logs
from baton.config_observe import ObserveConfig
from baton.ledger import STAGES
from deploy.monitoring.__main__ import FOLDER, files
from deploy.monitoring.dashboards import DASHBOARDS

if TYPE_CHECKING:
    from tests.unit.openai.conftest import Server

COMPLETE = "/v1/completions"
RULES = Path(__file__).resolve().parents[3] / "deploy/monitoring/alerts.yaml"
SECRET = "xylophone quagmire"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
# Names that PromQL has itself, labels and label values aside.
WORDS = re.compile(r"\b(?:baton|gen_ai)_[a-z_]+")
LABELS = re.compile(r"\b(?:by|ignoring|on) \(([^)]*)\)|\{([^}]*)\}")


def sampled(http: httpx2.Client) -> dict[str, list[dict[str, str]]]:
    """Labels of every sample by its name, from ``/metrics``."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append({**sample.labels, "=": str(sample.value)})
    return found


def total(found: dict[str, list[dict[str, str]]], name: str, **labels: str) -> float:
    return sum(float(one["="]) for one in found.get(name, []) if labels.items() <= one.items())


def complete(http: httpx2.Client, **body: Any) -> httpx2.Response:
    return http.post(COMPLETE, json={"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0} | body)


@pytest.fixture
def lines(server: Server) -> Iterator[io.StringIO]:
    """Everything that router and workers log meanwhile, as JSON, down to the least of it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    server.loop.call_soon_threadsafe(
        logs.configure, ObserveConfig(log_format="json", log_level="debug"), "test", stream
    )
    time.sleep(0.05)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def told(stream: io.StringIO) -> list[dict[str, Any]]:
    """What the service logged; the client of these tests runs in the same process."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if not line["logger"].startswith("http")]


def test_a_request_moves_every_meter(http: httpx2.Client) -> None:
    prompt = [*range(2000, 2060)]
    complete(http, prompt=prompt)
    before = sampled(http)
    for _ in range(2):
        assert complete(http, prompt=prompt).status_code == 200
    assert complete(http, temperature=9).status_code == 400
    assert complete(http, max_tokens=10**6).status_code == 400
    after = sampled(http)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    operation = {"gen_ai_operation_name": "text_completion"}
    assert grown("gen_ai_server_time_to_first_token_seconds_count", **operation) == 2
    assert grown("gen_ai_server_time_per_output_token_seconds_count", **operation) == 2
    whole_s = grown("gen_ai_server_request_duration_seconds_sum")
    assert sum(grown("baton_stage_seconds_sum", stage=stage) for stage in STAGES) == pytest.approx(whole_s)
    assert grown("baton_stage_seconds_sum", stage="prefill") > 0
    assert grown("baton_request_prompt_tokens_sum") == 120
    assert grown("baton_router_tokens_total") == grown("baton_request_output_tokens_sum") == 8
    assert (
        grown("baton_handoffs_total", transport="loopback", codec="lossless", carrier="a copy within one process") == 2
    )
    assert grown("baton_handoff_bytes_total") > 0
    assert grown("baton_handoff_codec_tokens_total", codec="lossless") > 0
    exposed_s = sum(grown("baton_stage_seconds_sum", stage=stage) for stage in ("encode", "wire", "land"))
    assert grown("baton_handoff_exposed_seconds_total") == pytest.approx(exposed_s)
    assert grown("baton_handoff_busy_seconds_total") > 0
    assert grown("baton_router_rejections_total", reason="malformed") == 1
    assert grown("baton_router_rejections_total", reason="context_length_exceeded") == 1
    assert grown("baton_slo_requests_total") == grown("baton_slo_kept_total") == 2


def test_the_prefix_caches_lookups_and_hits_arrive_with_the_load(server: Server, http: httpx2.Client) -> None:
    prompt = [*range(3000, 3070)]
    complete(http, prompt=prompt)
    server.wait_idle()
    before = sampled(http)
    complete(http, prompt=prompt)
    deadline_s = time.monotonic() + 5
    labels = {"role": "prefill"}
    while True:  # loads are pushed a little later
        after = sampled(http)
        hits = total(after, "baton_worker_prefix_hit_tokens_total", **labels)
        if hits > total(before, "baton_worker_prefix_hit_tokens_total", **labels):
            break
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert hits - total(before, "baton_worker_prefix_hit_tokens_total", **labels) == 64  # four pages of 16
    looked_up = "baton_worker_prefix_lookup_tokens_total"
    assert total(after, looked_up, **labels) - total(before, looked_up, **labels) == 70


def test_every_metric_that_is_drawn_or_alarms_is_exported(http: httpx2.Client) -> None:
    complete(http)
    complete(http, temperature=9)
    text = http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    exported = {sample.name for family in families for sample in family.samples}
    # A counter by reason has no sample before the first reason came, but its family is announced.
    exported |= {f"{family.name}_total" for family in families if family.type == "counter"}
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    queries = [query for one in DASHBOARDS for query in one.queries]
    queries += [rule["expr"] for group in rules for rule in group["rules"]]
    named = {name for query in queries for name in WORDS.findall(LABELS.sub("", query))}
    assert len(named) > 30
    assert named - exported == set()


def test_the_dashboards_in_the_repository_are_those_of_the_code() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert found == files(), "run python -m deploy.monitoring"
    for text in found.values():
        panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
        assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_one_line_tells_of_a_request_and_names_its_trace(http: httpx2.Client, lines: io.StringIO) -> None:
    headers = {"x-request-id": "my-own-id", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    body = {"prompt": "Once upon a time", "max_tokens": 3, "ignore_eos": True}
    assert http.post(COMPLETE, json=body, headers=headers).status_code == 200
    deadline_s = time.monotonic() + 5
    while not (ended := [line for line in told(lines) if line["message"] == "request ended: OK"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    [line] = ended
    assert (line["client_request_id"], line["trace_id"]) == ("my-own-id", TRACE)
    assert (line["output_tokens"], line["attempts"], line["workers"]) == (3, 1, ["d", "p"])
    assert 0 < line["ttft_s"] <= line["seconds"]
    of_workers = [other for other in told(lines) if other["logger"] == "baton.tasks"]
    assert {other["request_id"] for other in of_workers} <= {line["request_id"]}


def test_no_line_holds_a_prompt(server: Server, http: httpx2.Client, lines: io.StringIO) -> None:
    tokens = server.service._tokenizer.encode(SECRET)
    bodies: list[dict[str, Any]] = [
        {},
        {"stream": True},
        {"stop": [SECRET]},
        {"temperature": 9},
        {"max_tokens": 100_000},
        {"prompt": SECRET * 4000},
        {"prompt": tokens},
        {"prompt": [*tokens, 10**9]},
        {"prompt": {"text": SECRET}},
        {"unknown": SECRET},
        {"model": SECRET},
        {"baton": {"budget_ms": 1}},
    ]
    for body in bodies:
        complete(http, **({"prompt": SECRET} | body))
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2})
    http.post(COMPLETE, content=f'{{"prompt": "{SECRET}', headers={"content-type": "application/json"})
    http.post("/tokenize", json={"prompt": SECRET})
    http.get(f"/v1/models/{SECRET}")
    server.wait_idle()
    assert len(told(lines)) >= len(bodies)
    text = "\n".join(map(str, told(lines)))
    assert SECRET not in text
    assert "xylophone" not in text
    assert ", ".join(map(str, tokens)) not in text


def test_prompts_are_logged_where_that_was_asked_for(server: Server, http: httpx2.Client, lines: io.StringIO) -> None:
    observer = server.service.observer
    observer.log_prompts = True
    try:
        complete(http, prompt=SECRET)
    finally:
        observer.log_prompts = False
    assert [line["prompt"] for line in told(lines) if line["message"] == "asked"] == [SECRET]


def test_a_request_over_http_is_one_trace_below_its_callers(server: Server, http: httpx2.Client) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from router.tracing import Tracing

    exporter = InMemorySpanExporter()
    server.service.observer.tracing = tracing = Tracing(exporter, instance="r")
    try:
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        body = {"prompt": [*range(4000, 4100)], "max_tokens": 4, "n": 2, "ignore_eos": True}
        assert http.post(COMPLETE, json=body, headers=headers).status_code == 200
        server.wait_idle()
    finally:
        server.service.observer.tracing = None
    tracing.close()
    spans = exporter.get_finished_spans()
    assert {format(span.context.trace_id, "032x") for span in spans if span.context} == {TRACE}
    [root] = [span for span in spans if span.name.startswith("text_completion ")]
    assert (root.attributes or {})["gen_ai.usage.output_tokens"] == 8
    assert (root.attributes or {})["gen_ai.request.choice.count"] == 2
    for output in range(2):
        mine = {
            span.name: dict(span.attributes or {})
            for span in spans
            if (span.attributes or {}).get("baton.output") == output
        }
        assert {
            "admit",
            "queue",
            "prefill",
            "transfer",
            "encode",
            "wire",
            "land",
            "wait",
            "decode",
            "deliver",
        } <= mine.keys()
        assert (mine["prefill"]["baton.worker.id"], mine["decode"]["baton.worker.id"]) == ("p", "d")
        assert mine["transfer"]["baton.handoff.transport"] == "loopback"
