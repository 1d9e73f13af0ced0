"""What this router and its workers hold, have counted and timed, as Prometheus reads it.

Nothing is registered anywhere: each scrape builds the exposition from the status report and the router's meters.
Names that OpenTelemetry's GenAI conventions define are theirs, as its Prometheus exporters spell them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.wire import inference_pb2 as pb
from router.meters import Histogram, Meters, Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("refused", "completed", "failed", "cancelled")
COUNTED = ("connections_refused", "prefix_lookup_tokens", "prefix_hit_tokens", "preemptions")  # only grow, in Load
HELD = tuple(field.name for field in pb.Load.DESCRIPTOR.fields if field.name not in COUNTED)
PROVIDER = "baton"  # gen_ai.provider.name


class _Exposition(Collector):
    """Asks for the status anew at each scrape."""

    def __init__(
        self,
        report: Callable[[], pb.GetStatusResponse],
        meters: Meters,
        usable: Mapping[str, int],
        unauthenticated: int,
    ) -> None:
        self._report, self._meters, self._usable, self._unauthenticated = report, meters, usable, unauthenticated

    def collect(self) -> Iterator[Metric]:
        status = self._report()
        yield from _router(status)
        yield from _workers(status, self._usable)
        yield from _served(self._meters, status.model)
        yield from _requests(self._meters)
        strangers = CounterMetricFamily("baton_router_unauthenticated", "Calls without a good API key.")
        strangers.add_metric([], self._unauthenticated)
        yield strangers
        yield from _handoffs(self._meters)


def text(
    report: Callable[[], pb.GetStatusResponse],
    meters: Meters,
    *,
    usable: Mapping[str, int],
    unauthenticated: int = 0,
) -> bytes:
    """The exposition of what ``report`` and ``meters`` say now, in Prometheus's text format.

    usable: workers by role that a request could go to now. unauthenticated: calls that the gate turned away so far.
    """
    registry = CollectorRegistry()
    registry.register(_Exposition(report, meters, usable, unauthenticated))
    return generate_latest(registry)


def _router(status: pb.GetStatusResponse) -> Iterator[Metric]:
    router = status.router
    about = GaugeMetricFamily(
        "baton_info", "What this cluster serves; always 1.", labels=["model", "transport", "codec"]
    )
    about.add_metric([status.model, status.transport, status.codec], 1)
    inflight = GaugeMetricFamily("baton_router_inflight", "Requests being served now.", labels=["router"])
    inflight.add_metric([router.id], router.inflight)
    waiting = GaugeMetricFamily("baton_router_waiting", "Of them, those that wait at the router.", labels=["router"])
    waiting.add_metric([router.id], router.waiting)
    requests = CounterMetricFamily("baton_router_requests", "Requests by how they ended.", labels=["router", "outcome"])
    for outcome in OUTCOMES:
        requests.add_metric([router.id, outcome], getattr(router, outcome))
    tokens = CounterMetricFamily("baton_router_tokens", "Output tokens sent to clients.", labels=["router"])
    tokens.add_metric([router.id], router.tokens)
    yield from (about, inflight, waiting, requests, tokens)


def _workers(status: pb.GetStatusResponse, usable: Mapping[str, int]) -> Iterator[Metric]:
    """Every field of Load, how old it is, and whether the worker is trusted.

    A pool in which all are suspected still serves: how many it can use is not how many are trusted.
    """
    labels = ["role", "worker"]
    pools = GaugeMetricFamily("baton_pool_workers_ready", "Workers that the router can use.", labels=["role"])
    ready = GaugeMetricFamily(
        "baton_worker_ready", "1 while the worker is connected, stays and is trusted.", labels=labels
    )
    age = GaugeMetricFamily("baton_worker_load_age_seconds", "Since the worker last reported its load.", labels=labels)
    loads: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
        name: GaugeMetricFamily(f"baton_worker_{name}", f"Load.{name} of the contract.", labels=labels) for name in HELD
    }
    for name in COUNTED:
        loads[name] = CounterMetricFamily(f"baton_worker_{name}", f"Load.{name} of the contract.", labels=labels)
    for pool in status.pools:
        if pool.role == "decode" or status.transport:  # without a prefill pool nobody misses its workers
            pools.add_metric([pool.role], usable.get(pool.role, 0))
        for worker in pool.workers:
            ready.add_metric([pool.role, worker.id], worker.state == pb.WORKER_STATE_READY)
            age.add_metric([pool.role, worker.id], worker.load_age_s)
            for name, metric in loads.items():
                metric.add_metric([pool.role, worker.id], getattr(worker.load, name))
    yield from (pools, ready, age, *loads.values())


def _served(meters: Meters, model: str) -> Iterator[Metric]:
    """Times of outputs that ended as their clients wished."""
    labels = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]
    families = {
        "ttft": ("gen_ai_server_time_to_first_token_seconds", "From arrival to the first token."),
        "tpot": ("gen_ai_server_time_per_output_token_seconds", "Mean time per token after the first, by output."),
        "duration": ("gen_ai_server_request_duration_seconds", "From arrival to the last token."),
    }
    for attribute, (name, about) in families.items():
        by_operation: dict[tuple[str, ...], Histogram] = {
            (operation, PROVIDER, model): getattr(served, attribute) for operation, served in meters.served.items()
        }
        yield _histogram(name, about, labels, by_operation)
    stages: dict[tuple[str, ...], Histogram] = {(stage,): histogram for stage, histogram in meters.stages.items()}
    yield _histogram("baton_stage_seconds", "Time of outputs in each stage of the ledger.", ["stage"], stages)
    prompt, output = meters.prompt_tokens, meters.output_tokens
    yield _histogram("baton_request_prompt_tokens", "Prompt tokens of outputs that ended.", [], {(): prompt})
    yield _histogram("baton_request_output_tokens", "Tokens of outputs that ended.", [], {(): output})


def _requests(meters: Meters) -> Iterator[Metric]:
    """Promises kept, and what did not go the straight way."""
    slo = GaugeMetricFamily("baton_slo_seconds", "What a class is promised.", labels=["slo_class", "objective"])
    judged = CounterMetricFamily("baton_slo_requests", "Requests that count for goodput.", labels=["slo_class"])
    kept = CounterMetricFamily("baton_slo_kept", "Of them, those that met all their objectives.", labels=["slo_class"])
    for name, objectives in meters.objectives.items():
        for objective, seconds in (("ttft", objectives.ttft_s), ("tpot", objectives.tpot_s)):
            if seconds:
                slo.add_metric([name, objective], seconds)
        judged.add_metric([name], meters.judged[name])
        kept.add_metric([name], meters.kept[name])
    yield from (slo, judged, kept)
    yield _counter("baton_router_rejections", "Requests turned away, by reason.", meters.rejections)
    yield _counter("baton_router_failures", "Admitted requests that an error ended, by gRPC's code.", meters.failures)
    yield _counter("baton_router_retries", "Attempts that failed and were tried again, by reason.", meters.retries)


def _handoffs(meters: Meters) -> Iterator[Metric]:
    about = "Handoffs of outputs that ended, by transport, what really moved the bytes, and the codec of most of them."
    yield _counter("baton_handoffs", about, meters.handoffs)
    yield _counter("baton_handoff_bytes", "Encoded bytes that crossed.", meters.handoff_bytes)
    yield _counter("baton_handoff_codec_tokens", "Layers times tokens that crossed in each codec.", meters.codec_tokens)
    busy = CounterMetricFamily("baton_handoff_busy_seconds", "Encode, wire and land work of handoffs.")
    busy.add_metric([], meters.busy_s)
    exposed = CounterMetricFamily("baton_handoff_exposed_seconds", "Of it, what clients waited for.")
    exposed.add_metric([], meters.exposed_s)
    yield from (busy, exposed)


def _counter(name: str, about: str, tally: Tally) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=tally.labels)
    for values, amount in tally.sums.items():
        family.add_metric(values, amount)
    return family


def _histogram(
    name: str, about: str, labels: list[str], histograms: Mapping[tuple[str, ...], Histogram]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, about, labels=labels)
    for values, histogram in histograms.items():
        total, buckets = 0, []
        for bound, count in zip((*map(repr, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(values, buckets, histogram.sum)
    return family
